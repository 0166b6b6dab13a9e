"""Which pitfalls of fine-tuning do timm, fastai, Lightning and layerlr_helpers fall into? Each is run and measured.

    pip install .[compare]
    python -m benchmarks.pitfalls

in the repository's root prints a table and writes it, with what was measured, to docs/pitfalls.md. A library that is not
installed is left out of the printed table, and the document is then left as it is. Everything runs on a ResNet-18 with
random weights, on a few images of noise, on one thread of the CPU, in a minute or two.

Each library has a file of probes here; shared.py has what they have in common.
"""

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.libraries import OURS, PEERS, installed, optional, silence_lightning
from benchmarks.pitfalls.shared import Finding

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "pitfalls.md"
EVERYDAY = Path(__file__).with_name("everyday.md")  # the page's last section, which is written by hand
PITFALLS = {  # each row's title, and the function that is its probe in every library's file
    "A frozen layer's BatchNorm statistics move in train mode": "frozen_statistics",
    "A frozen layer's BatchNorm scale and shift still train": "frozen_scale",
    "A frozen layer normalises by the batch in train mode, so its output is not that of eval mode": "frozen_output",
    "Frozen after it has trained, a layer is still moved by momentum or weight decay": "frozen_after_training",
    "After unfreezing, some parameters are in no optimizer and never train": "unfrozen_parameters",
    "Unfreezing stops or derails the learning-rate schedule": "schedule_after_unfreezing",
    "A run resumed around an unfreezing fails or differs from one that was never stopped": "resumed_run",
    "Layer-wise rates are lost on torch's own optimizers and schedulers": "rates_in_torch",
    "A model that the library does not know gets one rate everywhere": "unknown_model",
    "Layers are ordered as they are defined, not as they run": "layer_order",
    "A name, pattern or index of a group that does not exist is accepted in silence": "unknown_name",
    "The library's own schedule changes the ratios between the layers' rates": "ratios_of_rates",
}
Findings = Mapping[str, Mapping[str, Finding]]  # by title, then by library


def table(findings: Findings) -> str:
    libraries = list(next(iter(findings.values())))
    rows = [f"| {i} | {title} | {' | '.join(finding.verdict for finding in by_library.values())} |"
            for i, (title, by_library) in enumerate(findings.items(), start=1)]
    return "\n".join([f"| | pitfall | {' | '.join(libraries)} |", "|" + "---|" * (len(libraries) + 2), *rows])


def notes(findings: Findings) -> str:
    parts = []
    for i, (title, by_library) in enumerate(findings.items(), start=1):
        lines = [f"- {library}, {finding.verdict}: {finding.note}." for library, finding in by_library.items()]
        parts.append("\n".join([f"**{i}. {title}.**", "", *lines]))
    return "\n\n".join(parts)


def document(findings: Findings) -> str:
    versions = ", ".join(f"{package} {version(package).split('+')[0]}" for package in (*PEERS.values(), "torch", "torchvision"))
    return f"""# Pitfalls of layer-wise fine-tuning, and who falls into them

Each cell was measured by running the library, used as its documentation says, on a ResNet-18 with random weights and a few
images of noise. "Falls in" means that the fault that the row names happened in documented use, with the defaults; where an
option avoids it, the notes name the option. Some of it is by design and documented: fastai and Lightning let BatchNorm train in
frozen layers on purpose, and Lightning's backbone is meant to catch up with the head. "n/a" means that the library leaves this
to its user. These checks test what this package set out to avoid, so read the column `{OURS}` as a regression test and the
others as what to look out for; each of these libraries does much that this one does not.

Versions: {versions}.

This page is generated: `pip install ".[compare]"`, then `python -m benchmarks.pitfalls` in the repository's root.

{table(findings)}

## What was measured

{notes(findings)}

{EVERYDAY.read_text(encoding="utf-8").rstrip()}
"""


def main() -> None:
    """Run every probe, print the table, and write the document if no library is missing."""
    torch.set_num_threads(1)  # as fast as more threads for models as small as these, and the same numbers on every machine
    files = {"timm": "timm_probes", "fastai": "fastai_probes", "Lightning": "lightning_probes", OURS: "our_probes"}
    probes = {library: optional(f"benchmarks.pitfalls.{file}") for library, file in files.items()}
    libraries = installed(probes)
    warnings.simplefilter("ignore")
    silence_lightning()
    findings = {title: {library: getattr(probes[library], probe)() for library in libraries}
                for title, probe in PITFALLS.items()}
    print(table(findings), notes(findings), sep="\n\n")
    if len(libraries) < len(files):
        print("\ndocs/pitfalls.md is left as it is, since not all libraries are installed")
    else:
        DOCUMENT.write_text(document(findings), encoding="utf-8")


if __name__ == "__main__":
    main()
