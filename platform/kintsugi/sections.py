"""The sections of an experiment's config: what can be set, its default and what it must be."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Preset = Literal["kla", "motion", "defocus", "noise", "lowlight", "jpeg", "mixed", "clean"]
Split = Literal["train", "val", "test"]


class Section(BaseModel):
    """A part of the config: immutable, and it refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """What is read and how training crops are cut."""

    dataset: str = Field(default="demo", min_length=1, description="name, or name@digest")
    crop: int = Field(default=256, ge=16, description="side of a training crop, px")
    small_images: Literal["refuse", "mirror"] = Field(
        default="refuse", description="what to do with images smaller than a crop: stop, or mirror them at their border"
    )
    defect_crops: float = Field(default=0.5, ge=0, le=1, description="share of crops on a defect")
    planted: float = Field(default=0.0, ge=0, le=1, description="share of crops that get small known defects")
    mask_dropout: float = Field(default=0.0, ge=0, le=1, description="share of crops with the mask withheld")
    flips: bool = True
    batch_size: int = Field(default=8, ge=1, description="over all workers together")
    loader_processes: int = Field(default=0, ge=0, description="decoding processes for each worker")


class DegradationConfig(Section):
    """How a clean image becomes the model's input where no degraded one was given."""

    presets: dict[Preset, float] = Field(default_factory=lambda: {"kla": 1.0})
    use_given: bool = Field(default=True, description="prefer the dataset's own degraded images")
    exposure: Literal["undo", "keep"] = Field(
        default="undo",
        description="what is learned where a preset changed gain and offset: the clean image, or the clean image as "
        "exposed. A single image does not tell its exposure",
    )

    @field_validator("presets")
    @classmethod
    def _shares(cls, presets: dict[Preset, float]) -> dict[Preset, float]:
        if not presets or min(presets.values()) < 0 or sum(presets.values()) <= 0:
            raise ValueError("needs at least one preset with a share above 0")
        return presets


Skip = Literal["off", "concat", "add", "gated"]


class ModelConfig(Section):
    """RestorationUNet. Defaults are the published recipe."""

    channels: int = Field(default=3, ge=1, description="of an image: 1 grey, 3 colour, or more")
    base: int = Field(default=64, ge=4, description="channels of the first level; doubles at each level")
    max_channels: int | None = Field(default=None, ge=4, description="no level has more; default: no limit")
    levels: int = Field(default=4, ge=1, le=6)
    stem: Literal[1, 2, 4] = Field(default=1, description="2 and 4: pixels are folded into channels first")
    block: Literal["conv", "residual", "naf"] = "conv"
    blocks: tuple[int, ...] = Field(
        default_factory=lambda data: (1,) * (data.get("levels", 4) + 1), description="at each level and the bottleneck"
    )
    norm: Literal["layer", "group", "none"] = Field(
        default="layer", description="group is taken over the whole input: tiles of one image would disagree"
    )
    bias: bool = Field(default=True, description="without: the output scales with the input (Mohan et al., ICLR 2020)")
    attention: Literal["channel", "channel_spatial", "none"] = "channel"
    attention_window: int | None = Field(
        default=None, ge=4, description="px that channel attention pools; default the whole input, as the recipe"
    )
    skips: tuple[Skip, ...] = Field(default_factory=lambda data: ("off",) * data.get("levels", 4))
    reduction: tuple[int, ...] = Field(
        default_factory=lambda data: (16,) * data.get("levels", 4), description="of channel attention"
    )
    downsample: Literal["max", "conv"] = "max"
    upsample: Literal["bilinear", "shuffle"] = "bilinear"
    dropout: float = Field(default=0.15, ge=0, lt=1)
    mask: Literal["given", "optional", "predicted", "none"] = Field(
        default="given", description="an input always, one that may be withheld, an output, or neither"
    )
    residual: bool = Field(default=False, description="predict the correction instead of the image")
    error: bool = Field(default=False, description="also predict a bound of the absolute error at each pixel")
    encoder: str | None = Field(
        default=None, description="a timm model's features in place of the levels below the first"
    )
    encoder_weights: str | None = Field(default=None, description="path of that model's weights")

    @field_validator("skips", "reduction", "blocks", mode="before")
    @classmethod
    def _one_for_all_levels(cls, value: Any, info: ValidationInfo) -> Any:
        levels = int(info.data.get("levels", 4)) + (info.field_name == "blocks")
        values = value if isinstance(value, list | tuple) else (value,) * levels
        if info.field_name == "skips":
            return [{True: "concat", False: "off"}[entry] if isinstance(entry, bool) else entry for entry in values]
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in (("skips", self.skips), ("reduction", self.reduction)):
            if len(values) != self.levels:
                raise ValueError(f"{name} needs one entry for each of the {self.levels} levels (got {len(values)})")
        if len(self.blocks) != self.levels + 1:
            raise ValueError(
                f"blocks needs one entry for each of the {self.levels} levels and one for the bottleneck "
                f"(got {len(self.blocks)})"
            )
        for name, values in (("reduction", self.reduction), ("blocks", self.blocks)):
            if min(values) < 1:
                raise ValueError(f"{name} must be at least 1 at every level (got {min(values)})")
        step = self.stem * 2**self.levels
        if self.attention_window is not None and self.attention_window % step:
            raise ValueError(
                f"attention_window must be a multiple of stem * 2**levels = {step} px (got {self.attention_window})"
            )
        if self.encoder is None and self.encoder_weights is not None:
            raise ValueError("encoder_weights needs encoder: name the timm model that they belong to")
        return self

    def other_weights(self, other: "ModelConfig") -> dict[str, Any]:
        """The settings, with their values in `other`, for which the weights of `other` are not this model's."""
        # Neither changes what weights there are.
        names = sorted(type(self).model_fields.keys() - {"dropout", "encoder_weights"})
        return {f"model.{name}": getattr(other, name) for name in names if getattr(self, name) != getattr(other, name)}


class LossWeights(Section):
    """Shares of the parts; they sum to 1. The first five are the published recipe's."""

    defect: float = Field(default=0.25, ge=0)
    ssim: float = Field(default=0.30, ge=0)
    perceptual: float = Field(default=0.20, ge=0)
    edge: float = Field(default=0.15, ge=0)
    basic: float = Field(default=0.10, ge=0)
    charbonnier: float = Field(default=0.0, ge=0)
    frequency: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = sum(self.model_dump().values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights must sum to 1 (they sum to {total:.6g}): divide each by {total:.6g}")
        return self


class PerceptualConfig(Section):
    """VGG features for the perceptual part (Johnson et al., ECCV 2016)."""

    network: Literal["vgg11", "vgg16", "vgg19"] = "vgg16"
    layers: tuple[int, ...] = Field(default=(3, 8, 15), description="indices into torchvision's vgg.features")
    weights: str = Field(default="imagenet", description="imagenet, random, or the path of a state dict")
    seed: int = Field(default=0, description="of the random weights")

    @model_validator(mode="after")
    def _layers_exist(self) -> Self:
        last = {"vgg11": 20, "vgg16": 30, "vgg19": 36}[self.network]
        if not self.layers or min(self.layers) < 0 or max(self.layers) > last:
            raise ValueError(f"layers must lie in 0..{last} for {self.network} (got {self.layers})")
        return self


class LossConfig(Section):
    """`mask`, `error` and `invention` are added to the weighted sum."""

    weights: LossWeights = LossWeights()
    mask: float = Field(default=0.0, ge=0, description="of the defect map, with model.mask=predicted")
    error: float = Field(default=0.0, ge=0, description="of the error bound, with model.error=true")
    error_quantile: float = Field(default=0.9, gt=0, lt=1, description="share of pixels that the bound shall hold for")
    invention: float = Field(default=0.0, ge=0, description="of structure added to defect-free pixels")
    perceptual: PerceptualConfig = PerceptualConfig()


class OptimConfig(Section):
    """AdamW with cosine annealing and warm restarts (Loshchilov and Hutter, ICLR 2017 and 2019)."""

    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    restart_epochs: int = Field(default=10, ge=1, description="length of the first cycle")
    restart_factor: int = Field(default=2, ge=1, description="growth of the cycles")
    min_learning_rate: float = Field(default=1e-6, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the averaged weights; 0: no averaging")


class Phase(Section):
    """A part of a curriculum: other values of `data` and `degradation` for the first `epochs` of a run."""

    epochs: int = Field(ge=1, description="how many epochs of the run it lasts")
    values: dict[str, Any] = Field(description="dotted keys, for example {data.crop: 64}")

    @field_validator("values")
    @classmethod
    def _only_data(cls, values: dict[str, Any]) -> dict[str, Any]:
        for key in values:
            if not key.startswith(("data.", "degradation.")) or key == "data.dataset":
                raise ValueError(f"'{key}' cannot change within a run: a phase sets data.* and degradation.*")
        return values


class TrainConfig(Section):
    epochs: int = Field(default=250, ge=1)
    steps_per_epoch: int | None = Field(default=None, ge=1, description="default: one pass over the data")
    curriculum: tuple[Phase, ...] = Field(default=(), description="phases one after the other, then the config itself")
    patience: int = Field(default=25, ge=1, description="epochs without a better score before it stops")
    validation_images: int | None = Field(default=None, ge=1, description="default: all")
    seed: int = 0
    workers: int = Field(default=2, ge=1, description="DDP processes")
    min_workers: int | None = Field(
        default=None, ge=1, description="go on with as few when nodes are lost, until they are back; default: wait"
    )
    micro_batches: int = Field(
        default=1, ge=1, description="a worker takes its share of a batch in so many parts and sums their gradients"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU, else fp32")
    compile: bool = Field(default=False, description="torch.compile the model: a minute or two, then faster steps")
    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="also save every so many steps within an epoch; default: only at its end"
    )
    checkpoint_minutes: float | None = Field(
        default=None, gt=0, description="also save within an epoch when the last save is so long ago"
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="stop after the epoch, or the save within it, that passes this"
    )
    cpus_per_worker: float = Field(default=1.0, gt=0)
    threads: int = Field(default=1, ge=1, description="torch threads of a CPU worker")
    gpu: bool = Field(default=False, description="one GPU for each worker")
    max_failures: int = Field(default=2, ge=-1, description="worker group restarts; -1 is without end")


Objective = Literal["score", "psnr", "defect_psnr"]


class SearchConfig(Section):
    """`screened` trials are tried on small budgets first; their best, and all later ones, get the full budget."""

    objectives: tuple[Objective, ...] = Field(
        default=("psnr", "defect_psnr"),
        description="what is sought, aligned, on the validation images, dB; score is the worse of the two gains",
    )
    trials: int = Field(default=16, ge=1, description="configs that are tried, screened ones among them")
    screened: int = Field(
        default_factory=lambda data: int(data.get("trials", 16)) // 2,
        ge=0,
        description="of the trials, how many are random and may be stopped early; default half",
    )
    epochs: int = Field(default=12, ge=1, description="full budget of a trial")
    screen_epochs: int = Field(
        default_factory=lambda data: max(1, int(data.get("epochs", 12)) // 3),
        ge=1,
        description="budget of a screened trial; default a third of epochs",
    )
    grace_epochs: int = Field(default=1, ge=1, description="no screened trial is stopped before")
    reduction_factor: int = Field(
        default=3, ge=2, description="one screened trial in this many passes a rung, and one gets the full budget"
    )
    sampler: Literal["auto", "gp", "tpe", "random"] = Field(
        default="auto", description="of the trials after screening; auto: gp, and tpe for more than 200 of them"
    )
    max_concurrent: int = Field(default=2, ge=1)
    budget_minutes: float | None = Field(default=None, gt=0, description="stop after; 'kintsugi tune --resume' goes on")
    workers_per_trial: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError("objectives needs one or more different names, for example [psnr, defect_psnr]")
        if self.screened > self.trials:
            raise ValueError(f"screened must be at most trials (got {self.screened} and {self.trials}): lower it")
        if self.screened and self.screen_epochs > self.epochs:
            raise ValueError(
                f"screen_epochs must be at most epochs (got {self.screen_epochs} and {self.epochs}): lower it"
            )
        if self.screened and self.grace_epochs > self.screen_epochs:
            raise ValueError(
                f"grace_epochs must be at most screen_epochs (got {self.grace_epochs} and {self.screen_epochs}), "
                "else no trial fits into its budget: lower it, or raise screen_epochs"
            )
        return self
