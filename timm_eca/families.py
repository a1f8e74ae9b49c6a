"""timm's modules: which of them have convolutional blocks, and which are transformers and MLPs."""

__all__ = ["FAMILIES", "TRANSFORMERS"]

# fmt: off
FAMILIES = frozenset((
    "byoanet", "byobnet", "convmixer", "convnext", "cpubone", "csatv2", "cspnet", "cspnext", "davit", "densenet",
    "dla", "dpn", "edgenext", "efficientformer", "efficientformer_v2", "efficientnet", "efficientvim",
    "efficientvit_mit", "efficientvit_msra", "fasternet", "fastvit", "focalnet", "gcvit", "ghostnet", "hardcorenas",
    "hgnet", "hrnet", "iformer", "inception_next", "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2",
    "lowformer", "mambaout", "maxxvit", "metaformer", "mobilenetv3", "mobilenetv5", "mobilevit", "nasnet", "nextvit",
    "nfnet", "pnasnet", "rdnet", "regnet", "repghost", "repvit", "res2net", "resnest", "resnet", "resnetv2", "rexnet",
    "selecsls", "senet", "shvit", "sknet", "starnet", "swiftformer", "tiny_vit", "tresnet", "vgg", "visformer",
    "vitamin", "vovnet", "xception", "xception_aligned",
))
# fmt: on
"""timm's modules with convolutional blocks that take attention."""

# fmt: off
TRANSFORMERS = frozenset((
    "beit", "cait", "coat", "convit", "crossvit", "deepseek_vit", "deit", "eva", "gemma4_vit", "hiera",
    "hieradet_sam2", "levit", "mlp_mixer", "mvitv2", "naflexvit", "nest", "pit", "pvt_v2", "qwen3_vit", "sequencer",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "twins", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "volo", "xcit",
))
# fmt: on
"""timm's modules of transformers and MLPs. Of levit and vision_transformer_hybrid some variants are convolutional."""
