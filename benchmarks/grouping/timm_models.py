"""The models of timm: one of each family, the smallest, against ``group_matcher`` and ``default_cfg["classifier"]``."""

import logging
from collections.abc import Mapping
from functools import partial

import timm
import torch
from timm.models import group_parameters, model_entrypoint
from torch import nn

from benchmarks.grouping.shared import Expected, Order, Subject

NAMES = """
    beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 eca_botnext26ts_256 eca_halonext26ts halo2botnet50ts_256
    halonet26t haloregnetz_b lambda_resnet26t lamhalobotnet50ts_256 bat_resnext26ts gcresnext26ts gernet_s mobileone_s1
    regnetz_b16 regnetz_c16 repvgg_a0 resnet32ts seresnext26ts cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny
    convmixer_768_32 convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny_hnf convnextv2_atto test_convnext
    cpubone_nano crossvit_9_240 crossvit_tiny_240 csatv2 cs3darknet_focus_s cspdarknet53 cspresnet50 cspresnext50 darknet17
    sedarknet21 cspnext_tiny davit_tiny deit3_small_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224
    densenet121 densenetblur121d dla46x_c dla34 dpn48b edgenext_xx_small edgenext_small_rw efficientformer_l1
    efficientformerv2_s0 efficientnet_b0 efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_el efficientnet_lite0
    efficientnetv2_rw_t fbnetc_100 mixnet_s mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv2_035 semnasnet_050 spnasnet_100
    tinynet_e tf_efficientnetv2_b0 efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0 eva02_tiny_patch14_224
    vit_medium_patch16_rope_reg1_gap_256 vit_small_patch16_dinov3 vit_pe_core_tiny_patch16_384
    vit_pe_spatial_tiny_patch16_512 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 fastvit_sa12 fastvit_mci0
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 ghostnetv3_050 hardcorenas_b hgnet_tiny hgnetv2_b0 hiera_tiny_224
    hiera_small_abswin_256 hieradet_small hrnet_w18_small iformer_t iformer_m_distilled inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s levit_conv_128s lowformer_b0 lowformer_e1
    mambaout_femto mambaout_kobe test_mambaout coatnet_pico_rw_224 coatnet_nano_cc_224 coatnext_nano_rw_224
    maxvit_pico_rw_256 maxvit_tiny_pm_256 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 test_coatnet
    caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12 gmixer_12_224 gmlp_ti16_224 mixer_s16_224 resmlp_12_224
    fbnetv3_b lcnet_035 mobilenetv3_small_050 tf_mobilenetv3_small_075 mobilenetv5_base mobilevit_xxs mobilevitv2_050
    mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small eca_nfnet_l0 nf_ecaresnet26
    nf_regnet_b0 nf_resnet26 nfnet_l0 test_nfnet pit_ti_224 pit_ti_distilled_224 pnasnet5large pvt_v2_b0
    rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvit_m1 res2next50 resnest14d resnet10t
    resnet18 resnet50 ecaresnet26t ecaresnext26t_32x4d resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d seresnet18
    wide_resnet50_2 resnetv2_18 rexnet_100 rexnetr_100 selecsls42 legacy_seresnet18 legacy_seresnext26_32x4d sequencer2d_s
    shvit_s1 skresnet18 skresnext50_32x4d starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swin_s3_tiny_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small
    vgg11 vgg11_bn visformer_tiny flexivit_small test_vit vit_tiny_patch16_224 vit_small_patch14_dinov2
    vit_small_patch14_reg4_dinov2 vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_224 vit_base_patch16_clip_224
    vit_dwee_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 vit_xsmall_patch16_clip_224
    vit_base_mci_224 vit_tiny_r_s16_p8_224 vit_small_r26_s32_224 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224
    samvit_base_patch16_224 vitamin_small_224 volo_d1_224 eca_vovnet39b ese_vovnet19b_slim_dw legacy_xception xception41p
    xcit_nano_12_p8_224 xcit_tiny_12_p8_224
"""
# Where the only models of a family are large or want large images, a smaller one of the same form.
SMALLER: Mapping[str, Mapping[str, object]] = {
    "vit_pe_core_tiny_patch16_384": {"img_size": 224},
    "vit_pe_spatial_tiny_patch16_512": {"img_size": 224},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "vit_small_patch14_reg4_dinov2": {"img_size": 224},
}

WITHOUT_HEAD = ("resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "efficientnet_b0",
                "mobilenetv3_small_050", "regnetx_002", "densenet121")  # as feature extractors, with num_classes=0
VISION_TRANSFORMERS = ("Beit", "VisionTransformer", "VisionTransformerDistilled", "Eva", "NaFlexVit", "VisionTransformerRelPos")


def expected_levels(model: nn.Module) -> dict[str, int]:
    """The number of levels that the published recipe of a model's family uses, where there is one.

    BEiT's, which MAE, DeiT III, EVA and DINOv2 took over: the patch embedding, each block, the head. ConvNeXt's and
    Swin's: the stem, each stage (or each block), the head; so for ResNets.
    """
    kind = type(model).__name__
    if kind in VISION_TRANSFORMERS:
        is_plain = getattr(model, "attn_pool", None) is None and not hasattr(getattr(model, "patch_embed", None), "backbone")
        return dict.fromkeys(("stage", "block"), len(model.blocks) + 2) if is_plain else {}
    if kind in ("ConvNeXt", "SwinTransformer", "SwinTransformerV2"):
        stages = [stage.blocks for stage in (model.stages if kind == "ConvNeXt" else model.layers)]
    elif kind == "ResNet":
        stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    else:
        return {}
    return {"stage": len(stages) + 2, "block": sum(map(len, stages)) + 2}


def build(name: str, *, classes: int = 10) -> Expected:
    model = timm.create_model(name, num_classes=classes, **SMALLER.get(name, {}))
    heads = model.default_cfg["classifier"] if classes else ()
    levels = {granularity: number - (not classes) for granularity, number in expected_levels(model).items()}
    return Expected(model, [heads] if isinstance(heads, str) else list(heads), orders(model), levels,
                    inputs=torch.zeros(1, *model.default_cfg["input_size"]))


def orders(model: nn.Module) -> list[Order]:
    """timm's order of the parameters, coarse and fine; a few of its models have none."""
    found = []
    for granularity, coarse in (("stage", True), ("block", False)):
        try:
            matcher = model.group_matcher(coarse=coarse)
        except (AttributeError, AssertionError):
            continue
        found.append(Order("timm", granularity, group_parameters(model, matcher, reverse=True)))
    return found


def subjects() -> list[Subject]:
    logging.getLogger("timm").setLevel(logging.ERROR)  # timm's own advice at each model

    def family(name: str) -> str:
        return model_entrypoint(name).__module__.rpartition(".")[2]

    return [*(Subject("timm", family(name), name, partial(build, name)) for name in NAMES.split()),
            *(Subject("timm", family(name), f"{name} (no head)", partial(build, name, classes=0)) for name in WITHOUT_HEAD)]
