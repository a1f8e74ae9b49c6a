"""The table of timm's blocks: where the residual branch of each ends. One row a block, and no import of timm.

A row reads: in `module:Class`, the tensor that `gate` has in braces ends the branch, as wide as the output of `width`.
"""

from .block_rule import BlockRule

__all__ = ["BLOCKS"]


def _rule(gate: str, *width: str, **kwargs) -> BlockRule:
    return BlockRule(gate, width, **kwargs)


def _resnet(norm: str, variable: str, slot: str = "se") -> tuple[BlockRule]:
    """A block with a slot after its last norm."""
    gate = f"{{self.{norm}({variable})}}"
    return (_rule(gate, norm, slot=slot, keep=f"{{self.{slot}({variable})}}"),)


def _byob(conv: str) -> tuple[BlockRule]:
    return (_rule(f"{{self.{conv}(x)}}", f"{conv}.bn", slot="attn_last", se=("attn",), keep="{self.attn_last(x)}"),)


def _cell(part: str, parts: int) -> tuple[BlockRule]:
    """A cell whose output concatenates parts of equal width."""
    return (_rule("{x_out}", *([part] * parts), scale=()),)


_UNFUSED = ("end", "add")  # timm fuses branch and skip into one convolution; with a layer between it cannot
_MBCONV = "{self.bn3(x)}"
_XCEPTION = "self._residual({self.stack(x)}, x) | forward_with_tap: self._residual({m(x_tap)}, x)"
_INCEPTION_V3 = "{torch.cat(outputs, 1)}"

BLOCKS: dict[str, tuple[BlockRule, ...]] = {
    # ResNets and their kin
    "resnet:BasicBlock": _resnet("bn2", "x"),
    "resnet:Bottleneck": _resnet("bn3", "x"),
    "res2net:Bottle2neck": _resnet("bn3", "out"),
    "resnest:ResNestBottleneck": (_rule("{self.bn3(out)}", "bn3"),),
    "sknet:SelectiveKernelBasic": (_rule("{self.conv2(x)}", "conv2.bn", slot="se", keep="{self.se(x)}"),),
    "sknet:SelectiveKernelBottleneck": (_rule("{self.conv3(x)}", "conv3.bn", slot="se", keep="{self.se(x)}"),),
    "senet:SEBottleneck": _resnet("bn3", "out", "se_module"),
    "senet:SEResNetBottleneck": _resnet("bn3", "out", "se_module"),
    "senet:SEResNeXtBottleneck": _resnet("bn3", "out", "se_module"),
    "senet:SEResNetBlock": _resnet("bn2", "out", "se_module"),
    "tresnet:BasicBlock": (_rule("{self.conv2(out)}", "conv2.bn", slot="se", keep="{self.se(out)}"),),
    "tresnet:Bottleneck": (_rule("{self.conv3(out)}", "conv3.bn", se=("se",)),),
    "resnetv2:PreActBasic": (_rule("{self.conv2(self.norm2(x))}", "conv2", scale=("norm2",)),),
    "resnetv2:PreActBottleneck": (_rule("{self.conv3(self.norm3(x))}", "conv3", scale=("norm3",)),),
    "resnetv2:Bottleneck": (_rule("{self.norm3(x)}", "norm3"),),
    "nfnet:NormFreeBlock": (
        _rule(
            "{self.conv3(self.act3(out))}",
            "conv3",
            scale=("conv3.gain", "conv3.bias"),
            se=("attn", "attn_last"),
        ),
    ),
    "regnet:Bottleneck": (_rule("{self.conv3(x)}", "conv3.bn", se=("se",)),),
    "regnet:PreBottleneck": (_rule("{self.conv3(x)}", "conv3", se=("se",)),),
    "byobnet:BasicBlock": _byob("conv2_kxk"),
    "byobnet:BottleneckBlock": _byob("conv3_1x1"),
    "byobnet:DarkBlock": _byob("conv2_kxk"),
    "byobnet:EdgeBlock": _byob("conv2_1x1"),
    "byobnet:SelfAttnBlock": (_rule("{self.conv3_1x1(x)}", "conv3_1x1.bn"),),
    "byobnet:RepVggBlock": (
        _rule(
            "{self.reparam_conv(x)}",
            "conv_1x1.bn",
            scale=("conv_1x1.bn", "conv_kxk.bn", "identity", "reparam_conv"),
            slot="attn",
            keep="{self.attn(self.reparam_conv(x))} | {self.attn(x)}",
        ),
    ),
    "byobnet:MobileOneBlock": (
        _rule(
            "{self.reparam_conv(x)}",
            "conv_kxk.0.bn",
            scale=("conv_kxk.*.bn", "conv_scale.bn", "identity", "reparam_conv"),
            slot="attn",
            keep="{self.attn(self.reparam_conv(x))} | {self.attn(out)}",
        ),
    ),
    "cspnet:BottleneckBlock": (
        _rule("{self.conv3(x)}", "conv3.bn", slot="attn3", se=("attn2",), keep="{self.attn3(x)}"),
    ),
    "cspnet:DarkBlock": (_rule("{self.conv2(x)}", "conv2.bn", se=("attn",)),),
    "cspnet:EdgeBlock": (_rule("{self.conv2(x)}", "conv2.bn", se=("attn",)),),
    "cspnext:CspNextBlock": (_rule("{self.conv2(self.conv1(x))}", "conv2.pointwise_conv.bn"),),
    "dla:DlaBasic": (_rule("{self.bn2(out)}", "bn2"),),
    "dla:DlaBottleneck": (_rule("{self.bn3(out)}", "bn3"),),
    "dla:DlaBottle2neck": (_rule("{self.bn3(out)}", "bn3"),),
    "dla:DlaRoot": (_rule("{self.bn(x)}", "bn", when="shortcut"),),
    "dpn:DualPathBlock": (
        _rule("{self.c1x1_c1(x)}", "c1x1_c1", when="c1x1_c1"),
        _rule("{self.c1x1_c(x)}", "c1x1_c.conv"),
    ),
    # EfficientNets and other inverted residuals
    "_efficientnet_blocks:DepthwiseSeparableConv": (_rule("{self.bn2(x)}", "bn2", se=("se",)),),
    "_efficientnet_blocks:InvertedResidual": (_rule(_MBCONV, "bn3", se=("se",)),),
    "_efficientnet_blocks:CondConvResidual": (_rule(_MBCONV, "bn3", se=("se",)),),
    "_efficientnet_blocks:EdgeResidual": (_rule("{self.bn2(x)}", "bn2", se=("se",)),),
    "_efficientnet_blocks:ConvBnAct": (_rule("{self.aa(x)}", "bn1", when="has_skip"),),
    "_efficientnet_blocks:UniversalInvertedResidual": (
        _rule("{self.dw_end(x)}", "dw_end.bn", se=("se",), when="dw_end.bn"),
        _rule("{self.dw_end(x)}", "pw_proj.bn", se=("se",)),
    ),
    "_efficientnet_blocks:MobileAttention": (_rule("{self.attn(x)}", "attn.output.proj"),),
    "ghostnet:GhostBottleneck": (
        _rule(
            "{self.ghost2(x)}",
            "ghost2.primary_conv.1",
            "ghost2.cheap_operation.1",
            scale=("ghost2.primary_conv.1", "/ghost2.cheap_operation.0.weight", "ghost2.cheap_operation.1"),
            se=("se",),
        ),
    ),
    "ghostnet:GhostBottleneckV3": (
        _rule("{self.ghost2(x)}", "ghost2.cheap_rpr_skip", "ghost2.cheap_rpr_skip", scale=(), se=("se",)),
    ),
    "repghost:RepGhostBottleneck": (
        _rule(
            "{self.ghost2(x)}",
            "ghost2.primary_conv.1",
            scale=("ghost2.cheap_operation.1", "ghost2.fusion_bn.*"),
            se=("se",),
        ),
    ),
    "rexnet:LinearBottleneck": (_rule("{self.conv_pwl(x)}", "conv_pwl.bn", se=("se",)),),
    "lcnetv2:RepDepthwiseSeparable": (
        _rule("{self.pw_conv(x)}", "pw_conv.bn", se=("se",), when="pw_conv.bn"),
        _rule("{self.pw_conv(x)}", "pw_conv.-1.bn", se=("se",)),
    ),
    "maxxvit:MbConvBlock": (_rule("{self.conv3_1x1(x)}", "conv3_1x1", se=("se", "se_early")),),
    "gcvit:MbConvBlock": (_rule("{self.conv_pw(x)}", "conv_pw", se=("se",)),),
    "vitamin:MbConvLNBlock": (_rule("{self.conv3_1x1(x)}", "conv3_1x1"),),
    "tiny_vit:MBConv": (_rule("{self.conv3(x)}", "conv3.bn"),),
    # ConvNeXts and other blocks that end in an MLP
    "convnext:ConvNeXtBlock": (
        _rule("{self.mlp(x)}", "mlp.fc2", when="use_conv_mlp"),
        _rule("{x.permute(0, 3, 1, 2)}", "mlp.fc2"),
    ),
    "maxxvit:ConvNeXtBlock": (
        _rule("{self.mlp(x)}", "mlp.fc2", when="use_conv_mlp"),
        _rule("{self.mlp(x)}", "mlp.fc2", nhwc=True),
    ),
    "inception_next:MetaNeXtBlock": (_rule("{self.mlp(x)}", "mlp.fc2"),),
    "fasternet:MLPBlock": (_rule("{self.mlp(x)}", "mlp.3"),),
    "starnet:Block": (_rule("{self.dwconv2(self.g(x))}", "dwconv2.conv"),),
    "convmixer:Residual": (_rule("{self.fn(x)}", "fn.2"),),
    "mambaout:GatedConvBlock": (_rule("{self.fc2(self.act(g) * torch.cat((i, c), dim=-1))}", "fc2", nhwc=True),),
    "csatv2:Block": (_rule("self.ls({x})", "pwconv2", scale=()),),
    "csatv2:PosConv": (_rule("{self.proj(cnn_feat)}", "proj"),),
    "edgenext:ConvBlock": (_rule("{self.mlp(x)}", "mlp.fc2", nhwc=True),),
    "efficientformer:MetaBlock2d": (_rule("{self.mlp(x)}", "mlp.norm2"),),
    "efficientformer_v2:EfficientFormerV2Block": (_rule("{self.mlp(x)}", "mlp.fc2.bn"),),
    "fastvit:RepMixerBlock": (_rule("{self.mlp(x)}", "mlp.fc2"),),
    "fastvit:RepMixer": (
        _rule("{self.mixer(x) - self.norm(x)}", "norm.identity", scale=(), when="norm.identity", where=_UNFUSED),
    ),
    "efficientvim:EfficientViMBlock": (
        _rule("{self.dwconv1(x)} - x", "dwconv1.norm", child="attn_dwconv1", where=_UNFUSED),
        _rule("{self.dwconv2(x)} - x", "dwconv2.norm", child="attn_dwconv2", where=_UNFUSED),
        _rule("{self.ffn(x)} - x", "ffn.fc2.norm"),
    ),
    "efficientvim:PatchMerging": (
        _rule("x + {self.dwconv1(x)}", "dwconv1.norm", child="attn_dwconv1", where=_UNFUSED),
        _rule("x + {self.dwconv2(x)}", "dwconv2.norm", child="attn_dwconv2", where=_UNFUSED),
    ),
    "maxxvit:TransformerBlock2d": (_rule("{self.mlp(self.norm2(x))}", "mlp.fc2"),),
    "nextvit:NextConvBlock": (
        _rule("{self.mhca(x)}", "mhca.projection", child="attn_mixer"),
        _rule("{self.mlp(out)}", "mlp.fc2"),
    ),
    "nextvit:NextTransformerBlock": (
        _rule("{self.mhca(out)}", "mhca.projection", child="attn_mixer"),
        _rule("{self.mlp(out)}", "mlp.fc2"),
    ),
    "swiftformer:Block": (_rule("{self.linear(x)}", "linear.fc2"),),
    "swiftformer:ConvEncoder": (_rule("{self.pwconv2(x)}", "pwconv2"),),
    "swiftformer:LocalRepresentation": (_rule("{self.pwconv2(x)}", "pwconv2"),),
    "visformer:Block": (_rule("{self.mlp(self.norm2(x))}", "mlp.conv3"),),
    "metaformer:MetaFormerBlock": (
        _rule(
            "{self.token_mixer(self.norm1(x))}",
            "token_mixer.pwconv2",
            child="attn_mixer",
            when="token_mixer.pwconv2.kernel_size",
        ),
        _rule("{self.mlp(self.norm2(x))}", "mlp.fc2", when="mlp.fc2.kernel_size"),
    ),
    # Blocks of other networks with residuals
    "repvit:RepViTBlock": (_rule("{self.channel_mixer(x)}", "channel_mixer.conv2.bn", se=("se",)),),
    "repvit:RepVggDw": (_rule("{self.conv(x) + self.conv1(x)}", "conv.bn", scale=(), where=_UNFUSED),),
    "repvit:RepVitDownsample": (_rule("{self.ffn(x)}", "ffn.conv2.bn"),),
    "hgnet:HighPerfGpuBlock": (
        _rule("{self.aggregation(x)}", "aggregation.1.bn", se=(), when="aggregation.1.bn"),
        _rule("{self.aggregation(x)}", "aggregation.0.bn", slot="aggregation.1", keep="{self.aggregation(x)}"),
    ),
    "vovnet:OsaBlock": (_rule("{self.conv_concat(x)}", "conv_concat.bn", slot="attn", keep="{self.attn(x)}"),),
    "inception_resnet_v2:Block35": (_rule("{self.conv2d(out)}", "conv2d"),),
    "inception_resnet_v2:Block17": (_rule("{self.conv2d(out)}", "conv2d"),),
    "inception_resnet_v2:Block8": (_rule("{self.conv2d(out)}", "conv2d"),),
    "xception:Block": (
        _rule("{self.rep(inp)}", "rep.-1", when="rep.-1.num_features"),
        _rule("{self.rep(inp)}", "rep.-2"),
    ),
    "xception_aligned:XceptionModule": (_rule(_XCEPTION, "stack.conv3.bn_pw"),),
    "xception_aligned:PreXceptionModule": (_rule(_XCEPTION, "stack.conv3.conv_pw"),),
    "efficientvit_mit:ResidualBlock": (
        _rule(
            "{self.main(self.pre_norm(x))}",
            "main.point_conv.conv",
            scale=("main.point_conv.norm",),
            when="main.point_conv",
        ),
        _rule("{self.main(self.pre_norm(x))}", "main.conv2.conv", scale=("main.conv2.norm",), when="main.conv2"),
    ),
    "lowformer:ResidualBlock": (
        _rule("{self.main(x)}", "main.point_conv.conv", scale=("main.point_conv.norm",), when="main.point_conv"),
        _rule("{self.main(x)}", "main.-2", when="main.-2.out_channels"),  # an MLP, then dropout
    ),
    "cpubone:ResidualBlock": (
        _rule("{self.main(x)}", "main.point_conv.conv", scale=("main.point_conv.norm",), when="main.point_conv"),
        _rule("{self.main(x)}", "main.-2", when="main.-2.out_channels"),  # an MLP, then dropout
    ),
    "efficientvit_msra:ResidualDrop": (
        _rule("{self.m(x)}", "m.bn", when="m.bn"),
        _rule("{self.m(x)}", "m.pw2.bn", when="m.pw2.bn"),
    ),
    "shvit:Residual": (
        _rule("{self.m(x)}", "m.bn", when="m.bn"),
        _rule("{self.m(x)}", "m.pw2.bn", when="m.pw2.bn"),
    ),
    "iformer:Residual": (_rule("{self.module(x)}", "module.-1.bn", when="module.-1.bn"),),
    "focalnet:FocalNetBlock": (
        _rule("{self.norm1_post(x)}", "norm1_post", child="attn_mixer", when="norm1_post.weight"),
        _rule("{self.norm1_post(x)}", "modulation.proj", child="attn_mixer"),
        _rule("{self.norm2_post(self.mlp(self.norm2(x)))}", "norm2_post", when="norm2_post.weight"),
        _rule("{self.norm2_post(self.mlp(self.norm2(x)))}", "mlp.fc2"),
    ),
    "davit:ConvPosEnc": (_rule("{self.proj(x)}", "proj"),),
    # Networks without residual additions, or with cells that are graphs: one layer per block
    "pooling:MaxPool2d": (_rule("{input}", "<", scale=(), family="vgg"),),
    "selecsls:SelecSlsBlock": (
        _rule("{self.conv6(torch.cat([d1, d2, d3], 1))} | {self.conv6(torch.cat([d1, d2, d3, x[1]], 1))}", "conv6.1"),
    ),
    "nasnet:CellStem0": _cell("conv_1x1.bn", 4),
    "nasnet:CellStem1": _cell("conv_1x1.bn", 4),
    "nasnet:FirstCell": _cell("conv_1x1.bn", 6),
    "nasnet:NormalCell": _cell("conv_1x1.bn", 6),
    "nasnet:ReductionCell0": _cell("conv_1x1.bn", 4),
    "nasnet:ReductionCell1": _cell("conv_1x1.bn", 4),
    "pnasnet:CellStem0": _cell("comb_iter_0_left.bn_sep_2", 5),
    "pnasnet:Cell": _cell("comb_iter_0_left.bn_sep_2", 5),
    "densenet:DenseLayer": (_rule("{self.conv2(self.norm2(bottleneck_output))}", "conv2"),),
    "rdnet:DenseBlock": (
        _rule(
            "{self.layers(x)}",
            "layers.layers.4",
            slot="layers.layers.5",
            keep="{self.layers(x)}",
            when="layers.layers.5",
        ),
        _rule("{self.layers(x)}", "layers.layers.4"),
    ),
    "inception_v3:InceptionA": (
        _rule(_INCEPTION_V3, "branch1x1.bn", "branch5x5_2.bn", "branch3x3dbl_3.bn", "branch_pool.bn"),
    ),
    "inception_v3:InceptionC": (
        _rule(_INCEPTION_V3, "branch1x1.bn", "branch7x7_3.bn", "branch7x7dbl_5.bn", "branch_pool.bn"),
    ),
    "inception_v3:InceptionE": (
        _rule(
            _INCEPTION_V3,
            "branch1x1.bn",
            "branch3x3_2a.bn",
            "branch3x3_2b.bn",
            "branch3x3dbl_3a.bn",
            "branch3x3dbl_3b.bn",
            "branch_pool.bn",
        ),
    ),
    "inception_v4:InceptionA": (
        _rule("{torch.cat((x0, x1, x2, x3), 1)}", "branch0.bn", "branch1.-1.bn", "branch2.-1.bn", "branch3.-1.bn"),
    ),
    "inception_v4:InceptionB": (
        _rule("{torch.cat((x0, x1, x2, x3), 1)}", "branch0.bn", "branch1.-1.bn", "branch2.-1.bn", "branch3.-1.bn"),
    ),
    "inception_v4:InceptionC": (
        _rule(
            "{torch.cat((x0, x1, x2, x3), 1)}",
            "branch0.bn",
            "branch1_1a.bn",
            "branch1_1b.bn",
            "branch2_3a.bn",
            "branch2_3b.bn",
            "branch3.-1.bn",
        ),
    ),
}
