"""How a run is carried out: machines, storage, tracking. None of these settings enters a fingerprint.

So they can change between two calls of `crossray run` without making a finished artifact stale.
"""

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
    """local starts a cluster on this machine. auto or host:port joins a running one."""
    autoscales: bool = False
    """The cluster starts nodes on demand. The run then waits for missing resources instead of refusing to start."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a local cluster. null takes the cores of the machine."""
    object_store_bytes: PositiveInt | None = None
    """Shared memory of a local cluster, in bytes. null takes a tenth of the machine's memory, at most 2 GB."""


def _own_names(value: dict[str, float]) -> dict[str, float]:
    taken = sorted({"CPU", "GPU", "memory", "object_store_memory"} & value.keys())
    if taken:
        raise ValueError(
            f"expected names that the cluster's nodes were given, such as extract, got {taken[0]!r}, which Ray counts "
            "itself; ask for processors with cpus and gpus"
        )
    return value


CustomResources = Annotated[dict[str, Annotated[float, Field(ge=1e-4)]], AfterValidator(_own_names)]
"""Amounts by name. Ray rounds amounts below a ten-thousandth to 0."""


class WorkersSection(Section):
    """The workers of one stage."""

    workers: PositiveInt | None = None
    """Number of processes. null takes as many as the CPUs and custom resources of the cluster allow."""
    cpus: PositiveFloat = 1.0
    """CPUs of each worker. It uses as many threads, rounded down, and at least one."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of each worker. Above 0, the models are placed on the GPU."""
    custom: CustomResources = Field(default_factory=dict)
    """Custom Ray resources that each worker takes, such as {extract: 1}. The stage then runs only on nodes that were
    started with that name (`ray start --resources`)."""
    max_retries: NonNegativeInt = 10
    """How often an item is repeated after its process was lost. One more loss fails the run."""


class ModelWorkersSection(WorkersSection):
    """Workers that hold both models."""

    placement: Literal["one_device", "two_devices", "spread"] = "one_device"
    """one_device holds both models on one device. two_devices gives each model its own. spread divides each model over
    all GPUs of the worker, for models larger than one GPU, and needs accelerate."""

    @model_validator(mode="after")
    def _enough_gpus(self) -> Self:
        if self.placement != "one_device" and 0 < self.gpus < 2:
            raise ValueError(
                f"placement {self.placement}: expected gpus of at least 2 per worker (or 0 for the CPU), got "
                f"{self.gpus:g}; raise gpus or use placement one_device"
            )
        return self


class ExtractionResources(ModelWorkersSection):
    """Workers that hold both models up to the layer."""

    min_workers: PositiveInt | None = None
    """Start with this many workers and grow to `workers` while work is waiting and the cluster has room or can start
    nodes. null starts all at once."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers is not None and self.workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"resources.extraction: expected min_workers <= workers, got min_workers={self.min_workers} and "
                f"workers={self.workers}"
            )
        return self


class TrainingResources(Section):
    """Ranks of the crosscoder stage: a mesh of data x latent."""

    data: PositiveInt = 1
    """Ranks that divide the rows of each global batch."""
    min_data: PositiveInt | None = None
    """Train with as few as this many data ranks while nodes are missing, and with more as nodes return (Ray Train's
    elastic mode). null waits for all. The result differs from an undisturbed run by rounding only."""
    latent: PositiveInt = 1
    """Ranks that divide the latents: each holds F / latent of them."""
    cpus: PositiveFloat | None = None
    """CPUs and threads of each rank. null divides the cores of the machine equally."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of each rank."""
    custom: CustomResources = Field(default_factory=dict)
    """Custom Ray resources that each rank takes, such as {train: 1}."""
    fits_at_a_time: PositiveInt | None = None
    """Crosscoders that are fitted from one read of the rows; the next ones read them again. null fits all together,
    which takes the memory of all (`crossray plan` tells it)."""
    kernels: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Implementation of the sparse operations. auto takes the fastest one for the device, and logs which."""
    checkpoint_every_steps: PositiveInt = 500
    """Steps between two checkpoints. A killed run repeats at most this many steps."""
    checkpoints_kept: PositiveInt = 2
    """Checkpoints to keep. Older ones are deleted."""
    max_restarts: NonNegativeInt = 2
    """How often training restarts after losing a rank. One more loss fails the run."""


class EndpointSection(Section):
    """A server with an OpenAI-compatible chat API: of a provider, or your own (vLLM, llama.cpp, Ollama)."""

    base_url: str | None = None
    """Address such as https://api.example.com/v1, to which /chat/completions is appended."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never read from a file, recorded or
    logged. null sends no key."""
    concurrency: PositiveInt = 8
    """Requests in flight at once. Lower it if the endpoint answers 429."""
    timeout_seconds: float = Field(120.0, gt=0, le=86_400)
    """Seconds to wait for an answer before the request is sent again."""
    max_retries: NonNegativeInt = 6
    """How often to repeat a request after 429, 5xx, a time-out or a lost connection. One more failure ends the run."""
    backoff_seconds: float = Field(1.0, gt=0, le=3600)
    """Seconds before the first retry. The wait doubles each time up to a minute, unless the endpoint names one."""
    price_in: NonNegativeFloat | None = None
    """Price of a million input tokens, in any currency. With price_out, plan states the cost."""
    price_out: NonNegativeFloat | None = None
    """Price of a million output tokens."""

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
    """Machines and workers of each stage."""

    cluster: ClusterSection = ClusterSection()
    """The Ray cluster."""
    tokens: WorkersSection = WorkersSection()
    """Workers that tokenise."""
    extraction: ExtractionResources = ExtractionResources()
    """Workers that extract activations."""
    training: TrainingResources = TrainingResources()
    """Ranks that fit the crosscoders."""
    analyses: ModelWorkersSection = ModelWorkersSection()
    """Workers of the analyses. Those of causality and steering hold both models whole."""
    autointerp: EndpointSection = EndpointSection()
    """The endpoint that analyses.autointerp uses."""


class StorageSection(Section):
    """Where artifacts are kept."""

    root: str = "runs"
    """Local folder or URL such as s3://bucket/prefix. Runs that share a root reuse each other's artifacts."""


class TrackingSection(Section):
    """Where metrics, figures and models are logged."""

    kind: Literal["mlflow", "none"] = "mlflow"
    """none logs nothing. The artifacts hold every number in either case."""
    uri: str | None = None
    """MLflow tracking URI. null uses MLFLOW_TRACKING_URI if set, else a SQLite file under a local storage root."""
    experiment: Annotated[str, Field(min_length=1)] = "crossray"
    """Name of the MLflow experiment."""
    log_every_steps: PositiveInt = 20
    """Training steps between two points of a logged curve."""
