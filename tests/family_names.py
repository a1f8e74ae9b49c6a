"""One name a module of timm, and how the tests of families make their models."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from conftest import randomize_
from timm_eca import add_attn_, attn_modules, plan_attn
from timm_eca.placement import placed_by_timm

# One name a module of timm, and one for each further kind of block; with the image size where 64 does not do.
NAMES = {
    "resnet10t": 64,
    "seresnet18": 64,
    "res2net50_14w_8s": 64,
    "resnest14d": 64,
    "skresnet18": 64,
    "skresnet50d": 64,
    "legacy_seresnet18": 64,
    "legacy_seresnext26_32x4d": 64,
    "tresnet_m": 64,
    "resnetv2_18": 64,
    "resnetv2_50": 64,
    "nf_resnet26": 64,
    "nfnet_f0": 64,
    "regnetx_002": 64,
    "regnety_002": 64,
    "regnetv_040": 64,
    "gernet_s": 64,
    "repvgg_a0": 64,
    "mobileone_s0": 64,
    "botnet26t_256": 256,
    "mobilevit_xxs": 64,
    "cspresnet50": 64,
    "darknet53": 64,
    "sedarknet21": 64,
    "cs3edgenet_x": 64,
    "cspnext_s": 64,
    "dla34": 64,
    "dla46_c": 64,
    "dla60_res2net": 64,
    "dpn48b": 64,
    "dpn68": 64,
    "hrnet_w18_small": 64,
    "efficientnet_b0": 64,
    "efficientnet_es": 64,
    "efficientnet_cc_b0_4e": 64,
    "tf_efficientnetv2_b0": 64,
    "mixnet_s": 64,
    "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small": 64,
    "mobilenetv4_hybrid_medium": 64,
    "mobilenetv5_300m_enc": 64,
    "hardcorenas_a": 64,
    "lcnet_035": 64,
    "ghostnet_050": 64,
    "ghostnetv3_050": 64,
    "repghostnet_050": 64,
    "rexnet_100": 64,
    "lcnetv2_small": 64,
    "coatnet_nano_rw_224": 224,
    "coatnext_nano_rw_224": 224,
    "gcvit_xxtiny": 224,
    "vitamin_small_224": 224,
    "tiny_vit_5m_224": 224,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "convnext_atto_ols": 64,
    "inception_next_atto": 64,
    "fasternet_t0": 64,
    "starnet_s1": 64,
    "convmixer_768_32": 64,
    "mambaout_femto": 64,
    "csatv2": 128,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "fastvit_t8": 64,
    "efficientvim_m1": 64,
    "nextvit_small": 64,
    "swiftformer_xs": 64,
    "visformer_tiny": 224,
    "poolformer_s12": 64,
    "convformer_s18": 64,
    "repvit_m0_9": 64,
    "hgnet_tiny": 64,
    "hgnetv2_b0": 64,
    "vovnet39a": 64,
    "ese_vovnet19b_dw": 64,
    "inception_resnet_v2": 96,
    "legacy_xception": 64,
    "xception41": 64,
    "xception41p": 64,
    "efficientvit_b0": 64,
    "efficientvit_l1": 64,
    "lowformer_b0": 64,
    "cpubone_b0_bfrobust": 64,
    "efficientvit_m0": 224,
    "shvit_s1": 224,
    "iformer_t": 64,
    "focalnet_tiny_srf": 64,
    "davit_tiny": 64,
    "levit_conv_128s": 224,
    "densenet121": 64,
    "rdnet_tiny": 64,
    "inception_v3": 96,
    "inception_v4": 96,
    "vgg11": 64,
    "vgg11_bn": 64,
    "selecsls42": 64,
    "nasnetalarge": 64,
    "pnasnet5large": 64,
}
LARGE = {"nasnetalarge", "pnasnet5large"}  # built and run once, not through every test
SMALL = [name for name in NAMES if name not in LARGE]
SMALLER = {
    "mobilenetv5_300m_enc": {"channel_multiplier": 0.125},
    "vgg11": {"mlp_ratio": 1 / 64},
    "vgg11_bn": {"mlp_ratio": 1 / 64},
}  # arguments that make a model smaller and leave its blocks as they are


def new(name, **kwargs):
    return timm.create_model(name, **SMALLER.get(name, {}), **kwargs)


class WithoutValues(TorchFunctionMode):
    """Random numbers are not drawn: half the time of making a model, of no use to one that loads its weights."""

    OF_TENSORS = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_)
    DRAWING = frozenset({*OF_TENSORS, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.DRAWING:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def copy_of(model):
    """What `copy.deepcopy` gives, in half the time: only tensors are copied by it, all else is pickled."""
    memo = {}  # of deepcopy: each tensor's copy by its id

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, torch.Tensor):
                copy.deepcopy(value, memo)
                return id(value)

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number):
            return memo[number]

    pickled = io.BytesIO()
    Pickler(pickled, pickle.HIGHEST_PROTOCOL).dump(model)
    pickled.seek(0)
    return Unpickler(pickled).load()


def image(name, batch=2):
    return torch.randn(batch, 3, NAMES[name], NAMES[name], generator=torch.Generator().manual_seed(0))


def create(name, **kwargs):
    """A model whose norms have random weights and the statistics of an image, so that no activation explodes."""
    torch.manual_seed(0)
    model = randomize_(new(name, **kwargs)).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(image(name))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model.eval()


def keeping(plain):
    """The placement that removes nothing: 'auto', or 'add' for a model with squeeze-and-excitation."""
    if placed_by_timm(type(plain)):
        return "add"
    return "add" if any(site.replaces for site in plan_attn(plain)) else "auto"


def with_attn(plain, **kwargs):
    """A copy with attention whose gates do not saturate, however large the activations of random weights."""
    where = "add" if placed_by_timm(type(plain)) else "auto"
    model = add_attn_(copy_of(plain), "eca", **{"attn_where": where, **kwargs})
    for layer in attn_modules(model).values():
        layer.conv.weight.data.mul_(0.01)
    return model


def enliven_(model):
    """Give every all-zero parameter a value: a branch scaled by zero passes no gradient to anything in it."""
    for parameter in model.parameters():
        if not parameter.count_nonzero():
            parameter.data.fill_(0.1)
    return model


small = pytest.mark.parametrize("name", SMALL)
