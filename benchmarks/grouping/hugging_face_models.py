"""The models of Hugging Face's transformers, built from small configurations, against heads and layers named by hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import transformers
from torch import Tensor

from benchmarks.grouping.shared import Expected, Order, Subject

LAYERS = 3
ONE_STACK, TWO_STACKS = LAYERS + 2, 2 * LAYERS + 2  # levels: the embeddings, each layer (of the encoder and decoder), the head

# Configurations, and what to call models with that have them.

SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 37, "num_labels": 3}
TEXT = SIZES | {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
ENCODER_DECODER = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 3, "max_position_embeddings": 64}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": LAYERS, "num_decoder_layers": LAYERS,
      "num_heads": 4, "num_labels": 3, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
IMAGE = SIZES | {"image_size": 32, "patch_size": 8}
STAGES = {"image_size": 64, "num_labels": 3, "hidden_act": "gelu"}
AUDIO = SIZES | {"conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3,
                 "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "vocab_size": 32, "pad_token_id": 0,
                 "classifier_proj_size": 16, "use_weighted_layer_sum": False}


def words(length: int) -> Tensor:
    """Tokens of a text, of which the last is the end of the sentence."""
    tokens = torch.randint(4, 90, (1, length), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 2
    return tokens


def noise(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


INPUTS = {
    "text": {"input_ids": words(8)},
    "long text": {"input_ids": words(64)},
    "choices": {"input_ids": words(8).expand(1, 2, 8)},
    "texts": {"input_ids": words(8), "decoder_input_ids": words(4)},
    "image": {"pixel_values": noise(3, 32, 32)},
    "large image": {"pixel_values": noise(3, 64, 64)},
    "sound": {"input_values": noise(1600)},
    "spectrogram": {"input_features": noise(8, 16)},
    "spectrogram and text": {"input_features": noise(8, 16), "decoder_input_ids": words(4)},
    "text and image": {"input_ids": words(8), "pixel_values": noise(3, 32, 32)},
    "layout": {"input_ids": words(8), "bbox": torch.zeros(1, 8, 4, dtype=torch.long)},
    "layout and image": {"input_ids": words(8), "bbox": torch.zeros(1, 8, 4, dtype=torch.long), "pixel_values": noise(3, 32,
        32)},
    "video": {"pixel_values": noise(2, 3, 32, 32)},
    "spectrogram values": {"input_values": noise(16, 8)},
    "series": {"past_values": noise(32, 2)},
}
HEADS = {"ForSequenceClassification": "classifier", "ForTokenClassification": "classifier", "ForMultipleChoice": "classifier",
         "ForQuestionAnswering": "qa_outputs", "ForCausalLM": "lm_head", "LMHeadModel": "lm_head",
         "ForConditionalGeneration": "lm_head", "ForImageClassification": "classifier", "ForCTC": "lm_head",
         "Model": "", "VisionModel": "", "MTModel": "lm_head", "EncoderModel": ""}


@dataclass(frozen=True)
class Case:
    """A model, and what an expert says of it.

    ``heads`` are the names of modules, and ``layers`` the ends of the names of lists of layers, separated by spaces. Each
    layer comes nearer to the output than the one before it. ``levels`` is the number of depths, where a recipe says it.
    """

    model: str
    config: Mapping[str, object]
    layers: str
    heads: str
    levels: int | None
    inputs: str
    with_head: str = ""
    tied: bool = False
    options: Mapping[str, object] = field(default_factory=dict)  # arguments of the model besides its configuration

    @property
    def name(self) -> str:
        return f"{self.model} (tied)" if self.tied else self.model


def cases(models: str, config: Mapping[str, object], layers: str, *, heads: str | None = None, levels: int | None = ONE_STACK,
          inputs: str = "text", with_head: str = "", tied: bool = False, **more) -> list[Case]:
    """A case for each model: ``"Bert: ForTokenClassification ForQuestionAnswering"`` are two.

    ``more`` goes to the configuration. The head is what its task calls it, if ``heads`` does not say otherwise; a model
    that is tied, or that has an empty one, has no head and therefore one level less.
    """
    family, _, tasks = models.partition(": ")
    found = []
    for task in tasks.split():
        head = "" if tied else HEADS[task] if heads is None else heads
        settings = {**config, **more} | ({"tie_word_embeddings": True} if tied else {})
        settings |= {"num_labels": 2} if task.startswith("ForQuestionAnswering") else {}  # where the answer starts and ends
        settings = {name: value for name, value in settings.items() if value is not None}
        found.append(Case(family + task, settings, layers, head,
                          levels and levels - (not head), "choices" if task == "ForMultipleChoice" else inputs, with_head, tied,
                          {"add_pooling_layer": False} if task == "Model" and family in POOLED else {}))
    return found


POOLED = ("Bert", "Roberta", "ViT", "Beit", "DeiT")
TASKS = "ForSequenceClassification ForTokenClassification ForQuestionAnswering"

CASES = [
    # Encoders of text
    *cases(f"Bert: {TASKS} ForMultipleChoice Model", TEXT, "encoder.layer", with_head="bert.pooler"),
    *cases("Bert: ForMaskedLM", TEXT, "encoder.layer", heads="cls", tie_word_embeddings=False),
    *cases(f"Roberta: {TASKS} Model", TEXT, "encoder.layer", max_position_embeddings=64, with_head="roberta.pooler"),
    *cases(f"XLMRoberta: {TASKS}", TEXT, "encoder.layer", max_position_embeddings=64),
    *cases(f"Camembert: {TASKS}", TEXT, "encoder.layer", max_position_embeddings=64),
    *cases(f"Electra: {TASKS} Model", TEXT, "encoder.layer", embedding_size=16, with_head="sequence_summary"),
    *cases(f"Deberta: {TASKS}", TEXT, "encoder.layer", relative_attention=True, pos_att_type=["p2c", "c2p"],
           with_head="pooler"),
    *cases(f"DebertaV2: {TASKS}", TEXT, "encoder.layer", relative_attention=True, pos_att_type=["p2c", "c2p"],
           position_buckets=8, with_head="pooler"),
    *cases(f"MPNet: {TASKS}", TEXT, "encoder.layer", max_position_embeddings=64),
    *cases(f"RoFormer: {TASKS}", TEXT, "encoder.layer", embedding_size=16),
    *cases(f"ConvBert: {TASKS}", TEXT, "encoder.layer", embedding_size=16, levels=None),
    *cases(f"Ernie: {TASKS}", TEXT, "encoder.layer", with_head="ernie.pooler"),
    *cases(f"MegatronBert: {TASKS}", TEXT, "encoder.layer", with_head="bert.pooler"),
    *cases(f"SqueezeBert: {TASKS}", TEXT, "encoder.layers", embedding_size=32, intermediate_size=64,
           with_head="transformer.pooler"),
    *cases(f"Nystromformer: {TASKS}", TEXT, "encoder.layer", segment_means_seq_len=8, num_landmarks=4),
    *cases(f"DistilBert: {TASKS}", TEXT, "transformer.layer", dim=32, hidden_dim=37, with_head="pre_classifier"),
    *cases(f"MobileBert: {TASKS}", TEXT, "encoder.layer", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16,
           num_feedforward_networks=2, with_head="mobilebert.pooler"),
    *cases(f"Albert: {TASKS}", TEXT, "", levels=3, embedding_size=16, with_head="albert.pooler"),
    *cases(f"Funnel: {TASKS}", TEXT, "encoder.blocks", levels=None, num_hidden_layers=None, block_sizes=[1, 1],
           num_decoder_layers=1, d_model=32,
           d_inner=37, n_head=4, d_head=8),
    *cases("Longformer: ForSequenceClassification ForTokenClassification", TEXT, "encoder.layer", inputs="text",
           attention_window=4, max_position_embeddings=80),
    *cases("BigBird: ForSequenceClassification ForTokenClassification", TEXT, "encoder.layer", attention_type="original_full"),
    *cases("BigBird: ForQuestionAnswering", TEXT, "encoder.layer", attention_type="original_full", heads="qa_classifier"),
    *cases(f"FNet: {TASKS}", TEXT, "encoder.layer", with_head="fnet.pooler"),
    *cases(f"Data2VecText: {TASKS}", TEXT, "encoder.layer", max_position_embeddings=64),
    *cases(f"ModernBert: {TASKS}", TEXT, "model.layers", levels=None, heads="classifier", with_head="head",
           global_attn_every_n_layers=2,
           cls_token_id=1, sep_token_id=2),
    *cases(f"RemBert: {TASKS}", TEXT, "encoder.layer", input_embedding_size=16, output_embedding_size=16, levels=None,
           with_head="rembert.pooler"),
    *cases("Canine: ForSequenceClassification", TEXT, "encoder.layer", levels=None, inputs="long text",
           with_head="canine.pooler",
           num_hash_buckets=50, local_transformer_stride=16, downsampling_rate=4),
    *cases(f"IBert: {TASKS}", TEXT, "encoder.layer", max_position_embeddings=64),
    *cases("Splinter: ForQuestionAnswering", TEXT, "encoder.layer", heads="splinter_qass"),
    *cases("XLNet: ForSequenceClassification", TEXT, "transformer.layer", heads="logits_proj", d_model=32, n_layer=LAYERS,
           n_head=4, d_inner=37, with_head="sequence_summary"),
    *cases("XLNet: ForTokenClassification", TEXT, "transformer.layer", d_model=32, n_layer=LAYERS, n_head=4, d_inner=37),
    *cases("XLNet: ForQuestionAnsweringSimple", TEXT, "transformer.layer", heads="qa_outputs", d_model=32, n_layer=LAYERS,
           n_head=4, d_inner=37),
    *cases("XLM: ForTokenClassification", TEXT, "transformer.attentions", emb_dim=32, n_layers=LAYERS, n_heads=4, levels=None),

    # Decoders of text
    *cases("GPT2: ForSequenceClassification", DECODER, "transformer.h", heads="score"),
    *cases("GPT2: ForTokenClassification ForQuestionAnswering LMHeadModel Model", DECODER, "h"),
    *cases("GPT2: LMHeadModel", DECODER, "h", tied=True),
    *cases("GPTNeo: ForSequenceClassification", DECODER, "h", heads="score", num_layers=LAYERS, num_heads=4,
           attention_types=[[["global"], LAYERS]]),
    *cases("GPTNeo: ForCausalLM", DECODER, "h", num_layers=LAYERS, num_heads=4, attention_types=[[["global"], LAYERS]]),
    *cases("GPTNeo: ForCausalLM", DECODER, "h", num_layers=LAYERS, num_heads=4, attention_types=[[["global"], LAYERS]],
           tied=True),
    *cases("GPTNeoX: ForCausalLM", DECODER, "gpt_neox.layers", heads="embed_out lm_head"),
    *cases("GPTNeoX: ForSequenceClassification", DECODER, "gpt_neox.layers", heads="score"),
    *cases("GPTJ: ForCausalLM", DECODER, "h", n_embd=32, n_layer=LAYERS, n_head=4, rotary_dim=4),
    *cases("OPT: ForSequenceClassification", DECODER, "decoder.layers", heads="score", ffn_dim=37, word_embed_proj_dim=32),
    *cases("OPT: ForCausalLM", DECODER, "decoder.layers", ffn_dim=37, word_embed_proj_dim=32),
    *cases("OPT: ForCausalLM", DECODER, "decoder.layers", ffn_dim=37, word_embed_proj_dim=32, tied=True),
    *cases("Bloom: ForSequenceClassification", DECODER, "h", heads="score", n_layer=LAYERS, n_head=4),
    *cases("Bloom: ForCausalLM", DECODER, "h", n_layer=LAYERS, n_head=4, tied=True),
    *cases("Llama: ForSequenceClassification ForTokenClassification", DECODER, "layers", heads="score"),
    *cases("Llama: ForCausalLM Model", DECODER, "layers"),
    *cases("Llama: ForCausalLM", DECODER, "layers", tied=True),
    *cases("Mistral: ForSequenceClassification ForTokenClassification", DECODER, "layers", heads="score"),
    *cases("Mistral: ForCausalLM", DECODER, "layers"),
    *cases("Qwen2: ForSequenceClassification", DECODER, "layers", heads="score"),
    *cases("Qwen2: ForCausalLM", DECODER, "layers", tied=True),
    *cases("Qwen3: ForSequenceClassification", DECODER, "layers", heads="score"),
    *cases("Qwen3: ForCausalLM", DECODER, "layers"),
    *cases("Gemma: ForSequenceClassification", DECODER, "layers", heads="score"),
    *cases("Gemma2: ForCausalLM", DECODER, "layers", tied=True),
    *cases("Gemma2: ForCausalLM", DECODER, "layers"),
    *cases("Phi: ForCausalLM", DECODER, "layers"),
    *cases("Phi: ForSequenceClassification", DECODER, "layers", heads="score"),
    *cases("Phi3: ForCausalLM", DECODER, "layers"),
    *cases("Falcon: ForSequenceClassification", DECODER, "h", heads="score", head_dim=None),
    *cases("StableLm: ForCausalLM", DECODER, "layers"),
    *cases("Cohere: ForCausalLM", DECODER, "layers", tied=True),
    *cases("Olmo2: ForCausalLM", DECODER, "layers"),
    *cases("Granite: ForCausalLM", DECODER, "layers"),
    *cases("SmolLM3: ForCausalLM", DECODER, "layers", tied=True),
    *cases("Starcoder2: ForCausalLM", DECODER, "layers"),
    *cases("Mpt: ForSequenceClassification", DECODER, "blocks", heads="score", d_model=32, n_heads=4, n_layers=LAYERS),
    *cases("CTRL: ForSequenceClassification", DECODER, "h", n_embd=32, n_layer=LAYERS, n_head=4, dff=37),
    *cases("Mixtral: ForCausalLM", DECODER, "layers", intermediate_size=64, num_local_experts=4),
    *cases("Mixtral: ForSequenceClassification", DECODER, "layers", heads="score", intermediate_size=64, num_local_experts=4),
    *cases("Qwen2Moe: ForCausalLM", DECODER, "layers", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
           shared_expert_intermediate_size=16),
    *cases("Olmoe: ForCausalLM", DECODER, "layers", intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    *cases("Mamba: ForCausalLM", DECODER, "layers"),
    *cases("Mamba: ForCausalLM", DECODER, "layers", tied=True),
    *cases("Mamba2: ForCausalLM", DECODER, "layers", num_heads=8, head_dim=8, n_groups=2, state_size=8),
    *cases("Rwkv: ForCausalLM", DECODER, "blocks", heads="head"),

    # Encoders with decoders
    *cases("T5: ForConditionalGeneration", T5, "encoder.block decoder.block", levels=TWO_STACKS, inputs="texts", tied=True),
    *cases("T5: EncoderModel", T5, "encoder.block"),
    *cases("T5: ForTokenClassification", T5, "encoder.block"),
    *cases("T5: ForSequenceClassification", T5, "encoder.block decoder.block", levels=TWO_STACKS, heads="classification_head"),
    *cases("UMT5: ForConditionalGeneration", T5, "encoder.block decoder.block", levels=TWO_STACKS, inputs="texts", tied=True),
    *cases("SwitchTransformers: ForConditionalGeneration", T5, "encoder.block decoder.block", levels=TWO_STACKS, inputs="texts",
           tie_word_embeddings=False, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    *cases("Bart: ForSequenceClassification", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS,
           heads="classification_head"),
    *cases("Bart: ForQuestionAnswering", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS),
    *cases("Bart: ForConditionalGeneration", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS, tied=True),
    *cases("Pegasus: ForConditionalGeneration", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS,
           inputs="texts", tied=True),
    *cases("Marian: MTModel", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS, inputs="texts", tied=True),
    *cases("MBart: ForSequenceClassification", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS,
           heads="classification_head"),
    *cases("Blenderbot: ForConditionalGeneration", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS,
           inputs="texts", tied=True),
    *cases("M2M100: ForConditionalGeneration", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS,
           inputs="texts", tied=True),

    # Images
    *cases("ViT: ForImageClassification Model", IMAGE, "layers", inputs="image"),
    *cases("DeiT: ForImageClassification", IMAGE, "layers", inputs="image"),
    *cases("DeiT: ForImageClassificationWithTeacher", IMAGE, "layers", inputs="image",
           heads="cls_classifier distillation_classifier"),
    *cases("Beit: ForImageClassification Model", IMAGE, "layers", inputs="image"),
    *cases("Data2VecVision: ForImageClassification", IMAGE, "layer", inputs="image"),
    *cases("Dinov2: ForImageClassification Model", IMAGE, "layer", inputs="image"),
    *cases("Dinov2WithRegisters: ForImageClassification", IMAGE, "layer", inputs="image"),
    *cases("ViTMSN: ForImageClassification", IMAGE, "layers", inputs="image"),
    *cases("ViTMAE: Model", IMAGE, "layers", inputs="image"),
    *cases("Yolos: ForObjectDetection", IMAGE, "layer", inputs="image", heads="class_labels_classifier bbox_predictor",
           image_size=[32, 32], num_detection_tokens=4),
    *cases("Swin: ForImageClassification", STAGES, "encoder.layers", levels=5, inputs="large image", embed_dim=16,
           depths=[1, 2, 1], num_heads=[2, 2, 4], window_size=4),
    *cases("Swinv2: ForImageClassification", STAGES, "encoder.layers", levels=5, inputs="large image", embed_dim=16,
           depths=[1, 2, 1], num_heads=[2, 2, 4], window_size=4),
    *cases("ConvNext: ForImageClassification Model", STAGES, "encoder.stages", levels=6, inputs="large image",
           hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1]),
    *cases("ConvNextV2: ForImageClassification", STAGES, "encoder.stages", levels=6, inputs="large image",
           hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1]),
    *cases("ResNet: ForImageClassification", STAGES, "encoder.stages", levels=6, inputs="large image", embedding_size=8,
           hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1], layer_type="basic", hidden_act="relu"),
    *cases("RegNet: ForImageClassification", STAGES, "encoder.stages", levels=6, inputs="large image", embedding_size=8,
           hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1], groups_width=8, hidden_act="relu"),
    *cases("Bit: ForImageClassification", STAGES, "encoder.stages", levels=6, inputs="large image", embedding_size=8,
           hidden_sizes=[8, 16, 16, 32], depths=[1, 2, 1, 1], num_groups=4, hidden_act="relu"),
    *cases("MobileNetV1: ForImageClassification", STAGES, "layer", levels=None, inputs="large image", depth_multiplier=0.25),
    *cases("MobileNetV2: ForImageClassification", STAGES, "layer", levels=None, inputs="large image", depth_multiplier=0.25),
    *cases("MobileViT: ForImageClassification", STAGES, "encoder.layer", levels=None, inputs="large image",
           hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 16], num_attention_heads=4, hidden_act="silu"),
    *cases("Segformer: ForImageClassification", STAGES, "", levels=None, inputs="large image", depths=[1, 1, 1, 1],
           hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4]),
    *cases("Segformer: ForSemanticSegmentation", STAGES, "", levels=None, inputs="large image", depths=[1, 1, 1, 1],
           hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16,
           heads="decode_head.classifier"),
    *cases("Pvt: ForImageClassification", STAGES, "", levels=None, inputs="large image", depths=[1, 1, 1, 1],
           hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4]),
    *cases("PoolFormer: ForImageClassification", STAGES, "", levels=None, inputs="large image", depths=[1, 1, 1, 1],
           hidden_sizes=[8, 16, 16, 32]),
    *cases("EfficientNet: ForImageClassification", STAGES, "encoder.blocks", levels=None, inputs="large image",
           width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, hidden_act="swish"),
    *cases("Cvt: ForImageClassification", STAGES, "encoder.stages", levels=None, inputs="large image", embed_dim=[16, 32, 48],
           depth=[1, 2, 3], num_heads=[1, 2, 3]),
    *cases("Levit: ForImageClassificationWithTeacher", STAGES, "", levels=None, inputs="large image",
           heads="classifier classifier_distill", hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
           key_dim=[8, 8, 8]),
    *cases("FocalNet: ForImageClassification", STAGES, "encoder.stages", levels=5, inputs="large image", embed_dim=16,
           hidden_sizes=[16, 32, 64], depths=[1, 2, 1], focal_levels=[1, 1, 1], focal_windows=[3, 3, 3]),
    *cases("DPT: ForSemanticSegmentation", IMAGE, "encoder.layer", levels=None, inputs="image", heads="head",
           with_head="auxiliary_head",
           backbone_out_indices=[0, 1, 2], neck_hidden_sizes=[8, 8, 8], fusion_hidden_size=16, is_hybrid=False,
           reassemble_factors=[2, 1, 0.5], hidden_act="gelu"),
    *cases("Detr: ForObjectDetection", ENCODER_DECODER, "encoder.layers decoder.layers", levels=None, inputs="large image",
           heads="class_labels_classifier bbox_predictor", num_queries=4, use_timm_backbone=False,
           use_pretrained_backbone=False,
           backbone=None, backbone_config={
               "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
               "layer_type": "basic", "out_features": ["stage4"]}),
    *cases("VideoMAE: ForVideoClassification", IMAGE, "encoder.layer", inputs="video", heads="classifier", num_frames=2,
           tubelet_size=2),

    # Sound
    *cases("Wav2Vec2: ForCTC", AUDIO, "encoder.layers", levels=None, inputs="sound"),
    *cases("Wav2Vec2: ForSequenceClassification", AUDIO, "encoder.layers", levels=None, inputs="sound", with_head="projector"),
    *cases("Hubert: ForSequenceClassification", AUDIO, "encoder.layers", levels=None, inputs="sound", with_head="projector"),
    *cases("WavLM: ForCTC", AUDIO, "encoder.layers", levels=None, inputs="sound"),
    *cases("Data2VecAudio: ForCTC", AUDIO, "encoder.layers", levels=None, inputs="sound"),
    *cases("Whisper: ForConditionalGeneration", ENCODER_DECODER, "encoder.layers decoder.layers", levels=TWO_STACKS,
           inputs="spectrogram and text", tied=True, num_mel_bins=8, max_source_positions=8, max_target_positions=16),
    *cases("Whisper: ForAudioClassification", ENCODER_DECODER, "encoder.layers", heads="classifier", with_head="projector",
           inputs="spectrogram", num_mel_bins=8, max_source_positions=8, classifier_proj_size=16),
    *cases("AST: ForAudioClassification", SIZES, "layers", inputs="spectrogram values", heads="classifier", patch_size=4,
           max_length=16, num_mel_bins=8, frequency_stride=4, time_stride=4),

    # Text with images or layout
    *cases("CLIP: Model", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
           "text_model.encoder.layers vision_model.encoder.layers", heads="text_projection visual_projection",
           inputs="text and image"),
    *cases("CLIP: ForImageClassification", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16, "num_labels": 3},
           "vision_model.encoder.layers", inputs="image"),
    *cases("Siglip: ForImageClassification", {"text_config": TEXT, "vision_config": IMAGE, "num_labels": 3},
           "vision_model.encoder.layers", inputs="image"),
    *cases("Blip: VisionModel", IMAGE, "encoder.layers", heads="", inputs="image"),
    *cases(f"LayoutLM: {TASKS}", TEXT, "encoder.layer", inputs="layout", with_head="layoutlm.pooler"),
    *cases(f"LayoutLMv3: {TASKS}", TEXT | IMAGE, "encoder.layer", inputs="layout and image", input_size=32, coordinate_size=6,
           shape_size=4),
    *cases(f"Lilt: {TASKS}", TEXT, "encoder.layer", inputs="layout", hidden_size=48, channel_shrink_ratio=2,
           max_position_embeddings=64),
    *cases("Vilt: ForTokenClassification", TEXT | IMAGE, "encoder.layer", inputs="text and image"),

    # Time series
    *cases("PatchTST: ForClassification", {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8,
                                          "d_model": 32, "num_attention_heads": 4, "ffn_dim": 37, "num_targets": 3,
                                          "num_hidden_layers": LAYERS}, "encoder.layers", heads="head", inputs="series"),
]


def build(case: Case) -> Expected:
    model_class = getattr(transformers, case.model)
    model = model_class(model_class.config_class(**case.config), **case.options)
    modules = dict(model.named_modules())
    heads = [head for head in case.heads.split() if head in modules]
    orders = []
    for end in case.layers.split():
        prefix = next(name for name in modules if f".{name}".endswith(f".{end}"))
        layers = len(modules[prefix])
        places = {name: int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name, _ in model.named_parameters()
                  if name.startswith(f"{prefix}.") and "downsample." not in name}  # of the stage that it opens
        orders.append(Order(f"{prefix} of {layers} layers", "block", places, strict=True))
    if case.heads and not heads:
        raise ValueError(f"no module {case.heads} in {case.model}")
    return Expected(model, heads, orders, {"stage": case.levels} if case.levels else {}, case.with_head.split(),
                    INPUTS[case.inputs])


def subjects() -> list[Subject]:
    transformers.logging.set_verbosity_error()
    return [Subject("Hugging Face", case.model.partition("For")[0], case.name, partial(build, case)) for case in CASES]
