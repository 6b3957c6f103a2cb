"""The gate on the way into production: whoever promotes a model by itself goes through here."""

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from kintsugi.checkpoint import CONFIG
from kintsugi.commands.console import note
from kintsugi.config import ExperimentConfig, load_config
from kintsugi.data.dataset import SplitReader, open_split
from kintsugi.errors import GateRefused
from kintsugi.evaluation.gate import Verdict, judge
from kintsugi.evaluation.scorecard import Scorecard, evaluate
from kintsugi.registry import SCORECARD, ModelVersion, Registry
from kintsugi.restore.restorer import Restorer
from kintsugi.storage import ObjectStore


def promote_gated(
    store: ObjectStore,
    candidate: ModelVersion,
    alias: str = "production",
    *,
    tolerance: float = 0.0,
    tell: Callable[[Verdict], None] | None = None,
) -> Verdict:
    """Point `alias` at a version if that is not worse than what it names, on the test split of its own dataset.

    Args:
        tolerance: dB by which overall PSNR may be lower.
        tell: is given the verdict before the alias moves or the version is refused.

    Raises:
        GateRefused: which bound failed.
        DataError: the dataset has no test images.
        PreconditionFailed: the alias moved meanwhile.
    """
    registry = Registry(store)
    number = registry.aliases(candidate.name).get(alias)
    if number is None:
        verdict = Verdict(candidate=candidate.ref)
    else:
        verdict = compare(registry, candidate, registry.version(candidate.name, number), tolerance=tolerance)
    if tell is not None:
        tell(verdict)
    if not verdict.passed:
        raise GateRefused(verdict.refusal())
    registry.promote(candidate.ref, alias, expected=number)
    return verdict


def compare(
    registry: Registry, candidate: ModelVersion, production: ModelVersion, *, tolerance: float = 0.0
) -> Verdict:
    """Judge two versions on the test split of the candidate's dataset, degraded as the candidate's config says.

    Raises:
        DataError: the dataset is not in the store, or has no test images.
    """
    config = load_config(registry.fetch(candidate) / CONFIG)
    reader = open_split(registry.store, config.data.dataset, "test")
    ours, theirs = (scorecard_on(registry, version, reader, config) for version in (candidate, production))
    return judge(ours, theirs, tolerance=tolerance)


def scorecard_on(registry: Registry, version: ModelVersion, reader: SplitReader, config: ExperimentConfig) -> Scorecard:
    """The version's scorecard of all images of a split, degraded as `config` says.

    It is the one that the version carries if that is of the same images and degradation, else made anew.
    """
    folder = registry.fetch(version)
    card = _carried(folder)
    if card is not None and _is_of(card, reader) and load_config(folder / CONFIG).degradation == config.degradation:
        return card.model_copy(update={"model": version.ref})
    dataset, split = config.data.dataset, reader.source.split
    note(f"evaluating {version.ref} on {len(reader)} images of {dataset.partition('@')[0]}/{split}")
    restorer = Restorer.from_checkpoint(folder)
    return evaluate(restorer, reader, config, dataset=dataset, split=split, model=version.ref)


def _carried(folder: Path) -> Scorecard | None:
    try:
        return Scorecard.model_validate_json((folder / SCORECARD).read_bytes())
    except ValidationError:
        return None


def _is_of(card: Scorecard, reader: SplitReader) -> bool:
    return (card.dataset_digest, card.split) == (reader.digest, reader.source.split) and (
        sorted(image.sample_id for image in card.images) == sorted(reader.sample_ids)
    )
