"""How a run is carried out: machines, places, tracking. Nothing here enters a fingerprint."""

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from pipeline.config.section import Section


class ClusterSection(Section):
    """The Ray cluster."""

    address: str = "local"
    """local starts one on this machine; auto or host:port joins a running one."""
    autoscales: bool = False
    """The cluster starts nodes on demand: what it lacks at the moment is waited for instead of refused."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a local cluster; None takes the machine's cores."""
    object_store_bytes: PositiveInt | None = None
    """Shared memory of a local cluster; None takes a tenth of the machine's memory, at most 2 GB."""


def _own_names(value: dict[str, float]) -> dict[str, float]:
    taken = sorted({"CPU", "GPU", "memory", "object_store_memory"} & value.keys())
    if taken:
        raise ValueError(
            f"expected names that the cluster's nodes were given, such as extract, got {taken[0]!r}, which Ray counts "
            "itself; ask for processors with cpus and gpus"
        )
    return value


CustomResources = Annotated[dict[str, Annotated[float, Field(ge=1e-4)]], AfterValidator(_own_names)]
"""Amounts by name; a ten-thousandth is the least that Ray can tell from nothing."""


class WorkersSection(Section):
    """A pool of workers of one stage."""

    workers: PositiveInt | None = None
    """Processes; None means as many as the cluster's CPUs and its custom resources allow."""
    cpus: PositiveFloat = 1.0
    """CPUs (and threads, rounded down, at least 1) of each worker."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of each worker; above 0 the models are put on the GPU."""
    custom: CustomResources = Field(default_factory=dict)
    """What else each worker takes of its node, such as {extract: 1}, by the names with which nodes were started (`ray
    start --resources`): the stage runs on those nodes alone."""
    max_retries: NonNegativeInt = 10
    """How often an item is repeated because its process was lost, before the run fails."""


class ModelWorkersSection(WorkersSection):
    """A pool of workers that hold both models."""

    placement: Literal["one_device", "two_devices", "spread"] = "one_device"
    """Both models of a worker on one device, base and chat on one each, or each spread over all GPUs of the worker: for
    models larger than one GPU (needs accelerate)."""

    @model_validator(mode="after")
    def _enough_gpus(self) -> Self:
        if self.placement != "one_device" and 0 < self.gpus < 2:
            raise ValueError(
                f"placement {self.placement}: expected gpus of at least 2 per worker (or 0 for the CPU), got "
                f"{self.gpus:g}; raise gpus or use placement one_device"
            )
        return self


class ExtractionResources(ModelWorkersSection):
    """The pool of workers that hold both models."""

    min_workers: PositiveInt | None = None
    """Start with this many and grow to `workers` while work is waiting and the cluster has room (also by starting
    nodes, where it can); None starts all at once."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers is not None and self.workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"resources.extraction: expected min_workers <= workers, got min_workers={self.min_workers} and "
                f"workers={self.workers}"
            )
        return self


class TrainingResources(Section):
    """Workers of the crosscoder stage: a mesh of data x latent ranks."""

    data: PositiveInt = 1
    """Ranks that share the rows of each global batch."""
    min_data: PositiveInt | None = None
    """Go on with as few as this many data ranks while nodes are missing, and take the others back as they return (Ray
    Train's elastic mode); None waits for all. The result differs from an undisturbed run by rounding alone."""
    latent: PositiveInt = 1
    """Ranks that share the latents: each holds F / latent of them."""
    cpus: PositiveFloat | None = None
    """CPUs (and threads) of each rank; None shares the machine's cores equally."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of each rank."""
    custom: CustomResources = Field(default_factory=dict)
    """What else each rank takes of its node, as for the pools, such as {train: 1}."""
    kernels: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Code of the sparse steps; auto takes the fastest that the device offers, and the choice is logged."""
    checkpoint_every_steps: PositiveInt = 500
    """A killed run repeats at most this many steps."""
    checkpoints_kept: PositiveInt = 2
    """Older checkpoints are removed."""
    max_restarts: NonNegativeInt = 2
    """How often lost workers are replaced before the run fails."""


class EndpointSection(Section):
    """A server that speaks the OpenAI chat protocol: a vendor's, or one's own (vLLM, llama.cpp, Ollama ...)."""

    base_url: str | None = None
    """Such as https://api.example.com/v1; /chat/completions is appended."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never read from a file, recorded or
    logged. null sends none."""
    concurrency: PositiveInt = 8
    """Requests under way at once; lower it where the endpoint answers 429."""
    timeout_seconds: PositiveFloat = 120.0
    """After so long without an answer a request is made again."""
    max_retries: NonNegativeInt = 6
    """How often a request is made again after 429, 5xx, a time-out or a lost connection, before the run ends."""
    backoff_seconds: PositiveFloat = 1.0
    """Wait before the first of these; doubled each time, up to a minute, or what the endpoint asks for."""
    price_in: NonNegativeFloat | None = None
    """Price of a million tokens read, in any currency; with price_out, plan states the cost."""
    price_out: NonNegativeFloat | None = None
    """Price of a million tokens written."""

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc or parts.query:
            raise ValueError(
                "expected an address like https://host/v1 without user, password or query, since it is recorded; put "
                "the key into an environment variable and name that in api_key_env"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _name_only(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError(
                "expected the name of an environment variable in capital letters, such as OPENAI_API_KEY; never write "
                "the key itself here"
            )
        return value


class ResourcesSection(Section):
    """Who does the work."""

    cluster: ClusterSection = ClusterSection()
    """The Ray cluster."""
    tokens: WorkersSection = WorkersSection()
    """Tokenising workers."""
    extraction: ExtractionResources = ExtractionResources()
    """Workers that hold both models up to the layer."""
    training: TrainingResources = TrainingResources()
    """Ranks that fit the crosscoders."""
    analyses: ModelWorkersSection = ModelWorkersSection()
    """Workers of the analyses; causality and steering hold both models whole."""
    autointerp: EndpointSection = EndpointSection()
    """The endpoint that analyses.autointerp asks."""


class StorageSection(Section):
    """Where artifacts live."""

    root: str = "runs"
    """Local folder or URL (s3://bucket/prefix). Artifacts of all runs share it and are found again by identity."""


class TrackingSection(Section):
    """Where numbers, figures and models are logged."""

    kind: Literal["mlflow", "none"] = "mlflow"
    """none logs nothing; the artifacts hold every number all the same."""
    uri: str | None = None
    """MLflow tracking URI; None uses MLFLOW_TRACKING_URI if set, else a SQLite file under a local storage root."""
    experiment: Annotated[str, Field(min_length=1)] = "crossray"
    """MLflow experiment."""
    log_every_steps: PositiveInt = 20
    """Distance of two points of a training curve."""
