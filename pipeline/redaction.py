"""What may hold a secret: recognised by its shape, refused where it would be recorded, and never shown.

`redacted` is applied to whatever reaches a person or a log: errors (errors.py), the terminal (terminal.py), the log
file (tracking/log_file.py). `has_secret` decides what sections of a run file and storage roots refuse, because they are
recorded, and what a job may not carry. Needs the standard library alone, like errors.py.
"""

import os
import re

HIDDEN = "***"
"""In place of a secret."""
_SHORTEST_VALUE = 8
"""Letters of an environment variable's value that is looked for in texts; shorter ones are words, like `test`."""

_NAME = re.compile(
    r"passw|passphrase|pgpass|secret|credential|signature|authorization|bearer|netrc|database_?url|conn\w*_?str"
    r"|(?:keys?|token|auth|jwt|cookies?|creds)(?![a-z])|(?<![a-z])(?:pass|sas|sig|dsn|pat|sid)(?![a-z])"
    r"|(?<=[a-z_])pwd",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s'\"<>]+)")
_PARAMETER = re.compile(r"(?P<name>[?&;#](?P<word>[\w.%-]+)=)(?P<value>[^&;#\s'\"<>]+)")
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|(?<=Bearer )[\w.~+/-]{8,}=*|(?<=Basic )[A-Za-z0-9+/]{8,}=*"
)


def redacted(text: str) -> str:
    """The text without passwords and signatures of URLs, tokens of known shapes, and this process's own secrets."""
    text = _without_shapes(text)
    for value in _own_secrets():
        text = text.replace(value, HIDDEN)
    return text


def has_secret(text: str) -> bool:
    """Whether a value shows a secret by its own shape: a URL with credentials, a token."""
    return _without_shapes(text) != text


def is_secret_name(name: str) -> bool:
    """Whether a variable or parameter of this name is likely to hold a secret: API_KEY, DATABASE_URL, sig."""
    return _NAME.search(_CAMEL.sub("_", name)) is not None


def _without_shapes(text: str) -> str:
    return _SHAPES.sub(HIDDEN, _PARAMETER.sub(_plain_parameter, _URL.sub(_plain_url, text)))


def _plain_url(match: re.Match[str]) -> str:
    """The URL without its user's secret: `scheme://user:***@host`; a user without a password stays for databases."""
    scheme, rest = match["scheme"], match["rest"]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition(":")[2]
    is_cut = "@" not in authority and ":" in authority and not port.rstrip("]),.;").isdigit()
    has_password = ":" in authority.partition("@")[0] and "@" in authority
    # A password may hold / and @ that nobody has quoted, so it ends at the last @.
    user, at, host = rest.rpartition("@") if is_cut or has_password else authority.rpartition("@")
    if not at:
        return match[0]
    if not (is_cut or has_password):
        host += rest[len(authority) :]
    name, colon, _ = user.partition(":")
    is_token = not colon and scheme.lower() in ("http://", "https://")
    return f"{scheme}{HIDDEN if is_token else name}{f':{HIDDEN}' if colon else ''}@{host}"


def _plain_parameter(match: re.Match[str]) -> str:
    return f"{match['name']}{HIDDEN}" if is_secret_name(match["word"]) else match[0]


def _own_secrets() -> list[str]:
    """Values of this process's environment variables whose names say that they are secrets, longest first.

    Paths are none: RAY_AUTH_TOKEN_PATH or SSH_AUTH_SOCK.
    """
    values = {value.strip() for name, value in os.environ.items() if is_secret_name(name)}
    long = (value for value in values if len(value) >= _SHORTEST_VALUE and not value.startswith(("/", "~", ".")))
    return sorted((value for value in long if "://" not in value), key=len, reverse=True)
