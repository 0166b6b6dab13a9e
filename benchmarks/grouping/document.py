"""The page about a run over all models: docs/grouping.md."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.grouping.shared import CHECKS, GRANULARITIES, Result

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "grouping.md"
# Where the two differ: models by pattern, who is right, and why. The first pattern that fits a model's name counts.
DIFFERENCES = (
    ("cait|convit|volo|xcit", "ours", "The class token enters late, and belongs to the layer that it enters; timm has it with the patches."),
    ("vit_srelpos", "neither", "The shared relative bias is in timm's group of the head, here in the stem; it enters every block."),
    ("efficientvim", "open", "A norm before an early output counts as early here and as late in timm."),
    ("efficientnet|mobilenet|mnasnet|mixnet|fbnet|tinynet|lcnet|ghostnet|hardcorenas|spnasnet|rexnet|hiera|gernet|inception",
     "open", "A stage ends here where the resolution changes; timm's coarse groups are the lists that the author wrote."),
    ("dla", "ours", "timm counts two layers before the first tree as stages, and the root of a tree with its last block."),
    ("coatnet|coatnext|maxvit|maxxvit|efficientformer|hrnet|hgnet|cpubone|davit", "ours",
     "Blocks stand alone with granularity block; timm's fine groups are its coarse ones here, or pairs of blocks."),
    ("convmixer", "timm", "A block is two layers in two lists, which here are layers of their own, or one stage of all."),
    ("edgenext|iformer|levit|swiftformer|efficientvit|cs3darknet|starnet|nextvit|repvit|fastvit|mobileone|shvit|lowformer", "timm",
     "A stage of blocks that are not alike is one level here, or is cut finer than blocks."),
    ("pe_core|siglip|naflex", "open", "The attention that pools is a level here; timm has it with the head."),
    ("gcvit|nest|pvt|twins|vovnet|nfnet|mobilevit|vit_.*r\\d|visformer|tnt|crossvit|coat|dpn|selecsls|vgg|pnasnet|nasnet", "open",
     "Convolutions between blocks, or layers of the stem, are levels on one side only."),
)


def document(results: Sequence[Result]) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("timm", "transformers", "torch"))
    rows = [f"| {kind} | {' | '.join(_share(results, library, kind) for library in ('timm', 'Hugging Face'))} |"
            for kind in CHECKS]
    wrong = [f"- {result.library}, `{result.name}`, {kind}: {fault}" for result in results for kind, fault in result.wrong.items()]
    return f"""# How `layer_groups` divides models, compared with timm and with lists written by hand

`python -m benchmarks.grouping` builds models with random weights, divides them with `layer_groups`, and compares. For
timm's models the reference is `group_matcher`, which every author writes by hand, and the classifier that the model names;
for Hugging Face's, heads and layers that we wrote down from each architecture. The first table counts what is right. *Heads*
are right if exactly the head's parameters are at depth 0; a model that is tied or has no head must have none there, and warn.
*Order* is right if no parameter that comes earlier in the reference is nearer to the output here. *Levels* are right if there
are as many depths as in the published recipe, for models that have one (BERT and ELECTRA: embeddings, n layers, head; BEiT,
MAE and DINOv2: patch embedding, n blocks, head; ConvNeXt and Swin: stem, 4 stages or each block, head).

Versions: {versions}.

| right | timm | Hugging Face |
|---|---|---|
{chr(10).join(rows)}

## Where the result differs from the reference

{chr(10).join(wrong) or "Nothing."}

ALBERT uses one layer several times. There is nothing that repeats, so its second embedding layer is a level of its own here.

## Where the number of levels differs from timm's

timm's coarse groups are compared with granularity `stage` (runs of blocks between changes of resolution, or each encoder
layer of a transformer), its fine ones with `block` (each block by itself). `dla34` 8, 12 and 6, 19 means that timm has 8
coarse and 12 fine levels, and that there are 6 stages and 19 blocks here. *Who is right* is our judgement of where a
layer-wise rate should change. Where it says *timm*, the helper has the right order, but it is coarser or finer than one would
want.

| who is right | why | models |
|---|---|---|
{_differences(results)}
"""


def _share(results: Sequence[Result], library: str, kind: str) -> str:
    checked = [result for result in results if result.library == library and kind in result.checked]
    return f"{sum(kind not in result.wrong for result in checked)} of {len(checked)}"


def _differs(result: Result) -> bool:
    return result.library == "timm" and any(result.reference_levels.get(name) not in (None, result.levels.get(name))
                                            for name in GRANULARITIES)


def _differences(results: Sequence[Result]) -> str:
    """One row for each judgement, with all models that it is about."""
    models: dict[tuple[str, str], list[str]] = {}
    for result in filter(_differs, results):
        who, why = next(((who, why) for pattern, who, why in DIFFERENCES if re.search(pattern, result.name)), ("not judged", ""))
        theirs, ours = (", ".join(str(levels.get(name, "-")) for name in GRANULARITIES)
                        for levels in (result.reference_levels, result.levels))
        models.setdefault((who, why), []).append(f"`{result.name}` {theirs} and {ours}")
    rows = sorted(models.items(), key=lambda item: item[0][0] == "not judged")
    return "\n".join(f"| {who} | {why} | {'; '.join(found)} |" for (who, why), found in rows)
