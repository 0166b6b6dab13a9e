"""peft: the twenty lines of LoRA in the course give what peft gives."""

import peft
import torch
import transformers

from layerlr_helpers.course.lora import add_lora
from layerlr_helpers.minilm import TextClassifier

CONFIG = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def test_the_same_matrices_give_the_same_outputs_and_the_same_gradients_as_in_peft():
    torch.manual_seed(0)
    bert = transformers.BertModel(CONFIG, add_pooling_layer=False)
    ours, theirs = TextClassifier(bert, 3), TextClassifier(transformers.BertModel(CONFIG, add_pooling_layer=False), 3)
    theirs.load_state_dict(ours.state_dict())
    ours = add_lora(ours, rank=4, alpha=8)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]), theirs)
    matrices = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
            matrices[f"{name}.default.weight"].data.copy_(p.data)
    tokens = torch.randint(40, (2, 5))
    ours(tokens).square().sum().backward()
    theirs(tokens).square().sum().backward()
    torch.testing.assert_close(ours(tokens), theirs(tokens))
    compared = 0
    for name, p in ours.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(p.grad, matrices[f"{name}.default.weight"].grad)
            compared += 1
    assert compared == 8
