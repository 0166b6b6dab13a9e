"""Everyday models of other libraries in small: the depths of their recipes, and their batches, adapters and metrics in fit."""

import accelerate
import lightning
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import torchmetrics
import transformers
from torch import nn

from layerlr_helpers import (
    ProgressiveUnfreezing,
    UnfreezePlan,
    evaluate,
    fit,
    head_and_backbone,
    layer_decay,
    layer_groups,
    one_cycle,
    param_groups,
)
from layerlr_helpers.integrations.hugging_face import UnfreezingTrainerCallback
from layerlr_helpers.integrations.lightning import UnfreezingCallback
from tests.everyday.helpers import batches, depths, examples, holder, mlp, numbered

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries are their affair; ours are asked for by name

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
TOKENS = {"input_ids": torch.ones(1, 6, dtype=torch.long)}
IMAGE = torch.ones(1, 3, 64, 64)


# --- timm -------------------------------------------------------------------------------------------------------------

def test_a_vision_transformer_has_patch_embedding_blocks_and_head_and_tells_its_own_input():
    groups = layer_groups(timm.create_model("vit_tiny_patch16_224", num_classes=5))
    assert depths(groups, "patch_embed", "cls_token", "pos_embed", *numbered("blocks", 12)) == [13, 13, 13, *range(12, 0, -1)]
    assert sorted({group.depth for group in groups}) == [*range(14)]
    assert depths(groups, "head") == [0]


def test_a_convnext_has_stem_four_stages_and_head_and_the_same_stages_without_a_head():
    groups = layer_groups(timm.create_model("convnext_atto", num_classes=5), IMAGE)
    assert depths(groups, "stem", *numbered("stages", 4), "head.fc") == [5, 4, 3, 2, 1, 0]
    with pytest.warns(UserWarning, match=r"no head of its own, since it ends in stages\.3"):
        groups = layer_groups(timm.create_model("convnext_atto", num_classes=0), IMAGE)
    assert depths(groups, "stem", *numbered("stages", 4)) == [5, 4, 3, 2, 1]
    rates = head_and_backbone(backbone_lr=1e-5, head_lr=1e-2)(groups)
    assert set(rates.values()) == {1e-5}


def test_both_classifiers_of_a_distilled_model_are_heads():
    groups = layer_groups(timm.create_model("levit_128s", num_classes=5))
    assert depths(groups, "head", "head_dist") == [0, 0]
    assert depths(groups, "stages.2") == [1]


def test_numbered_blocks_of_a_regnet_are_levels_of_their_own():
    model = timm.create_model("regnetx_002", num_classes=5)
    groups = layer_groups(model, IMAGE, granularity="block")
    stages = {name: model.get_submodule(name) for name in ("s1", "s2", "s3", "s4")}
    each = [f"{name}.{block}" for name, stage in stages.items() for block, _ in stage.named_children()]
    assert depths(groups, "stem", *each, "head.fc") == [*range(len(each) + 1, -1, -1)]


# --- transformers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "head"), [
    (transformers.BertForSequenceClassification, "classifier"), (transformers.BertForTokenClassification, "classifier"),
    (transformers.BertForQuestionAnswering, "qa_outputs")])
def test_bert_has_embeddings_layers_and_head_for_every_task(make, head):
    groups = layer_groups(make(transformers.BertConfig(num_labels=2, **SMALL)), TOKENS)
    assert depths(groups, "bert.embeddings", *numbered("bert.encoder.layer", 3), head) == [4, 3, 2, 1, 0]


def test_a_tied_encoder_and_decoder_are_one_path_from_the_shared_embeddings_and_have_no_head():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2,
                                   decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.warns(UserWarning, match="T5ForConditionalGeneration has no head of its own"):
        groups = layer_groups(model, TOKENS | {"decoder_input_ids": torch.ones(1, 4, dtype=torch.long)})
    assert depths(groups, "shared", *numbered("encoder.block", 2), *numbered("decoder.block", 2)) == [5, 4, 3, 2, 1]


def test_a_layer_of_experts_stays_closed_whichever_experts_a_short_text_reaches():
    config = transformers.MixtralConfig(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1, pad_token_id=0,
                                        **SMALL)
    groups = layer_groups(transformers.MixtralForCausalLM(config), {"input_ids": torch.tensor([[3]])})
    assert depths(groups, "model.embed_tokens", *numbered("model.layers", 3), "lm_head") == [4, 3, 2, 1, 0]


def test_the_batches_of_a_collator_go_straight_into_fit_and_the_models_own_loss_is_validated():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL))
    data = [transformers.BatchEncoding({"input_ids": torch.randint(50, (4, 6)), "labels": torch.randint(3, (4,)),
                                        "attention_mask": torch.ones(4, 6, dtype=torch.long)}) for _ in range(3)]
    optimizer = torch.optim.AdamW(param_groups(layer_groups(model, TOKENS), layer_decay(1e-2, 0.8)))
    rows = fit(model, optimizer, data, epochs=3, val_loader=data, clip_grad_norm=1.0, progress=False).rows
    model.eval()
    expected = sum(model(**batch).loss.item() for batch in data) / 3
    assert rows[-1]["val_loss"] == pytest.approx(expected, rel=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]


# --- the callbacks hold still what is frozen --------------------------------------------------------------------------

class Watch:
    """Sees after each step whether a parameter is still what it was, bit for bit; a callback of either library."""

    def __init__(self, parameter):
        self.parameter, self.before, self.seen = parameter, parameter.detach().clone(), []

    def look(self, *args, **kwargs):
        self.seen.append(torch.equal(self.parameter, self.before))


class TrainerWatch(Watch, transformers.TrainerCallback):
    on_step_end = Watch.look


class LightningWatch(Watch, lightning.Callback):
    on_train_batch_end = Watch.look


@pytest.mark.slow
def test_under_trainer_a_frozen_layer_stands_still_bit_for_bit_until_its_step(tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **SMALL))
    groups = layer_groups(model, TOKENS)
    optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(1e-2, 0.8)))
    watch = TrainerWatch(model.bert.encoder.layer[0].output.dense.weight)
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=6, per_device_train_batch_size=2, report_to=[],
                                               use_cpu=True, save_strategy="no", disable_tqdm=True)
    unfreezing = ProgressiveUnfreezing(groups, UnfreezePlan({"*": 3, "head": 0}))
    data = [{"input_ids": torch.randint(50, (6,)), "labels": i % 3} for i in range(12)]
    transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, one_cycle(optimizer, 6)),
                         callbacks=[UnfreezingTrainerCallback(unfreezing), watch]).train()
    assert watch.seen == [True] * 3 + [False] * 3


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(param_groups(self.groups, layer_decay(1e-2, 0.5)))


def test_under_lightning_a_frozen_layer_stands_still_bit_for_bit_until_its_step(tmp_path):
    module = Module()
    module.groups = layer_groups(module, torch.ones(2, 6))
    watch = LightningWatch(module.net[0].weight)
    unfreezing = ProgressiveUnfreezing(module.groups, UnfreezePlan({"*": 3, "head": 0}))
    trainer = lightning.Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
                                callbacks=[UnfreezingCallback(unfreezing), watch])
    trainer.fit(module, batches(*examples(24), batch_size=4))
    assert watch.seen == [True] * 3 + [False] * 3


# --- peft, torchmetrics, accelerate -----------------------------------------------------------------------------------

ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["2", "4"], modules_to_save=["6"]),
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["2", "4"], modules_to_save=["6"]),
    "IA3": lambda: peft.IA3Config(target_modules=["2", "4"], feedforward_modules=["4"], modules_to_save=["6"]),
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_a_plan_trains_what_an_adapter_method_trains_and_never_more(config):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = peft.get_peft_model(net, config())
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = layer_groups(model, torch.ones(2, 6))
    head = next(name for name in free if name.endswith("6.modules_to_save.default.weight"))
    assert holder(groups, head).depth == 0
    optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(0.1, 0.9), weight_decay=0.1))
    fit(model, optimizer, batches(*examples(24), batch_size=4), epochs=2, progress=False,
        unfreezing=ProgressiveUnfreezing(groups, UnfreezePlan.top_down(groups, every=1)))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == free
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert head in moved
    assert moved <= free


def test_a_metric_of_torchmetrics_is_of_all_examples_and_begins_anew_in_each_evaluation():
    x, y = examples(23)
    model, score = nn.Linear(6, 3), torchmetrics.classification.MulticlassF1Score(3, average="macro")
    expected = torchmetrics.functional.classification.multiclass_f1_score(model(x), y, 3, average="macro").item()
    for _ in range(2):
        assert evaluate(model, batches(x, y, batch_size=4), metrics={"f1": score})["f1"] == pytest.approx(expected)


def test_a_schedule_of_the_plain_optimizer_beside_a_prepared_one_is_refused_and_without_it_fit_trains():
    groups = layer_groups(model := mlp())
    before, loader = model[0].weight.detach().clone(), batches(*examples(16))
    optimizer = torch.optim.AdamW(param_groups(groups, layer_decay(1e-2, 0.5)))
    schedule = one_cycle(optimizer, 2)
    model, prepared = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    with pytest.raises(ValueError, match="a torch scheduler of the optimizer that is passed to fit"):
        fit(model, prepared, loader, epochs=1, schedule=schedule, progress=False)
    assert torch.equal(model[0].weight, before)
    fit(model, prepared, loader, epochs=1, progress=False)
    assert not torch.equal(model[0].weight, before)
