"""Accelerate: a schedule that is not prepared ends where it should, in one process and in two."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.nn.functional import cross_entropy
from layerlr_helpers import ProgressiveUnfreezing, UnfreezePlan, layer_decay, layer_groups, one_cycle, param_groups
from tests.integrations.small import batches, small

model = small()
groups = layer_groups(model)
unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=2))
accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(1e-2, 0.5)))
schedule = one_cycle(optimizer, 8)  # not prepared: it is stepped once a step, in however many processes
model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
rates = []
for step in range(8):
    unfreezing.apply(step)
    rates.append(optimizer.param_groups[-1]["lr"])
    for inputs, labels in loader:
        accelerator.backward(cross_entropy(model(inputs), labels))
        break
    optimizer.step(); schedule.step(); optimizer.zero_grad()
everywhere = accelerator.gather(torch.cat([p.detach().flatten() for p in model.parameters()])[None])
if accelerator.is_main_process:
    print(accelerator.num_processes, min(range(8), key=rates.__getitem__), bool((everywhere == everywhere[0]).all()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_schedule_that_is_not_prepared_has_its_lowest_rate_at_its_last_step(tmp_path, processes, pytestconfig):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                           program], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(pytestconfig.rootpath),
                                                                                         "OMP_NUM_THREADS": "1"})
    assert done.stdout.split() == [str(processes), "7", "True"], done.stderr
