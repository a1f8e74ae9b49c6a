"""The table of timm's blocks: where the residual branch of each ends. One row a block, and no import of timm.

A row reads: in `module:Class`, the tensor that `gate` has in braces ends the branch, as wide as the output of `width`.
"""

from .block_rule import BlockRule, after_norm, byob, cell, row

__all__ = ["BLOCKS"]


_UNFUSED = ("end", "add")  # timm fuses branch and skip into one convolution; with a layer between it cannot
_MBCONV = "{self.bn3(x)}"
_XCEPTION = "self._residual({self.stack(x)}, x) | forward_with_tap: self._residual({m(x_tap)}, x)"
_INCEPTION_V3 = "{torch.cat(outputs, 1)}"

BLOCKS: dict[str, tuple[BlockRule, ...]] = {
    # ResNets and their kin
    "resnet:BasicBlock": after_norm("bn2", "x"),
    "resnet:Bottleneck": after_norm("bn3", "x"),
    "res2net:Bottle2neck": after_norm("bn3", "out"),
    "resnest:ResNestBottleneck": (row("{self.bn3(out)}", "bn3"),),
    "sknet:SelectiveKernelBasic": (row("{self.conv2(x)}", "conv2.bn", slot="se", keep="{self.se(x)}"),),
    "sknet:SelectiveKernelBottleneck": (row("{self.conv3(x)}", "conv3.bn", slot="se", keep="{self.se(x)}"),),
    "senet:SEBottleneck": after_norm("bn3", "out", "se_module"),
    "senet:SEResNetBottleneck": after_norm("bn3", "out", "se_module"),
    "senet:SEResNeXtBottleneck": after_norm("bn3", "out", "se_module"),
    "senet:SEResNetBlock": after_norm("bn2", "out", "se_module"),
    "tresnet:BasicBlock": (row("{self.conv2(out)}", "conv2.bn", slot="se", keep="{self.se(out)}"),),
    "tresnet:Bottleneck": (row("{self.conv3(out)}", "conv3.bn", se=("se",)),),
    "resnetv2:PreActBasic": (row("{self.conv2(self.norm2(x))}", "conv2", scale=("norm2",)),),
    "resnetv2:PreActBottleneck": (row("{self.conv3(self.norm3(x))}", "conv3", scale=("norm3",)),),
    "resnetv2:Bottleneck": (row("{self.norm3(x)}", "norm3"),),
    "nfnet:NormFreeBlock": (
        row(
            "{self.conv3(self.act3(out))}",
            "conv3",
            scale=("conv3.gain", "conv3.bias"),
            se=("attn", "attn_last"),
        ),
    ),
    "regnet:Bottleneck": (row("{self.conv3(x)}", "conv3.bn", se=("se",)),),
    "regnet:PreBottleneck": (row("{self.conv3(x)}", "conv3", se=("se",)),),
    "byobnet:BasicBlock": byob("conv2_kxk"),
    "byobnet:BottleneckBlock": byob("conv3_1x1"),
    "byobnet:DarkBlock": byob("conv2_kxk"),
    "byobnet:EdgeBlock": byob("conv2_1x1"),
    "byobnet:SelfAttnBlock": (row("{self.conv3_1x1(x)}", "conv3_1x1.bn"),),
    "byobnet:RepVggBlock": (
        row(
            "{self.reparam_conv(x)}",
            "conv_1x1.bn",
            scale=("conv_1x1.bn", "conv_kxk.bn", "identity", "reparam_conv"),
            slot="attn",
            keep="{self.attn(self.reparam_conv(x))} | {self.attn(x)}",
        ),
    ),
    "byobnet:MobileOneBlock": (
        row(
            "{self.reparam_conv(x)}",
            "conv_kxk.0.bn",
            scale=("conv_kxk.*.bn", "conv_scale.bn", "identity", "reparam_conv"),
            slot="attn",
            keep="{self.attn(self.reparam_conv(x))} | {self.attn(out)}",
        ),
    ),
    "cspnet:BottleneckBlock": (
        row("{self.conv3(x)}", "conv3.bn", slot="attn3", se=("attn2",), keep="{self.attn3(x)}"),
    ),
    "cspnet:DarkBlock": (row("{self.conv2(x)}", "conv2.bn", se=("attn",)),),
    "cspnet:EdgeBlock": (row("{self.conv2(x)}", "conv2.bn", se=("attn",)),),
    "cspnext:CspNextBlock": (row("{self.conv2(self.conv1(x))}", "conv2.pointwise_conv.bn"),),
    "dla:DlaBasic": (row("{self.bn2(out)}", "bn2"),),
    "dla:DlaBottleneck": (row("{self.bn3(out)}", "bn3"),),
    "dla:DlaBottle2neck": (row("{self.bn3(out)}", "bn3"),),
    "dla:DlaRoot": (row("{self.bn(x)}", "bn", when="shortcut"),),
    "dpn:DualPathBlock": (
        row("{self.c1x1_c1(x)}", "c1x1_c1", when="c1x1_c1"),
        row("{self.c1x1_c(x)}", "c1x1_c.conv"),
    ),
    # EfficientNets and other inverted residuals
    "_efficientnet_blocks:DepthwiseSeparableConv": (row("{self.bn2(x)}", "bn2", se=("se",)),),
    "_efficientnet_blocks:InvertedResidual": (row(_MBCONV, "bn3", se=("se",)),),
    "_efficientnet_blocks:CondConvResidual": (row(_MBCONV, "bn3", se=("se",)),),
    "_efficientnet_blocks:EdgeResidual": (row("{self.bn2(x)}", "bn2", se=("se",)),),
    "_efficientnet_blocks:ConvBnAct": (row("{self.aa(x)}", "bn1", when="has_skip"),),
    "_efficientnet_blocks:UniversalInvertedResidual": (
        row("{self.dw_end(x)}", "dw_end.bn", se=("se",), when="dw_end.bn"),
        row("{self.dw_end(x)}", "pw_proj.bn", se=("se",)),
    ),
    "_efficientnet_blocks:MobileAttention": (row("{self.attn(x)}", "attn.output.proj"),),
    "ghostnet:GhostBottleneck": (
        row(
            "{self.ghost2(x)}",
            "ghost2.primary_conv.1",
            "ghost2.cheap_operation.1",
            scale=("ghost2.primary_conv.1", "/ghost2.cheap_operation.0.weight", "ghost2.cheap_operation.1"),
            se=("se",),
        ),
    ),
    "ghostnet:GhostBottleneckV3": (
        row("{self.ghost2(x)}", "ghost2.cheap_rpr_skip", "ghost2.cheap_rpr_skip", scale=(), se=("se",)),
    ),
    "repghost:RepGhostBottleneck": (
        row(
            "{self.ghost2(x)}",
            "ghost2.primary_conv.1",
            scale=("ghost2.cheap_operation.1", "ghost2.fusion_bn.*"),
            se=("se",),
        ),
    ),
    "rexnet:LinearBottleneck": (row("{self.conv_pwl(x)}", "conv_pwl.bn", se=("se",)),),
    "lcnetv2:RepDepthwiseSeparable": (
        row("{self.pw_conv(x)}", "pw_conv.bn", se=("se",), when="pw_conv.bn"),
        row("{self.pw_conv(x)}", "pw_conv.-1.bn", se=("se",)),
    ),
    "maxxvit:MbConvBlock": (row("{self.conv3_1x1(x)}", "conv3_1x1", se=("se", "se_early")),),
    "gcvit:MbConvBlock": (row("{self.conv_pw(x)}", "conv_pw", se=("se",)),),
    "vitamin:MbConvLNBlock": (row("{self.conv3_1x1(x)}", "conv3_1x1"),),
    "tiny_vit:MBConv": (row("{self.conv3(x)}", "conv3.bn"),),
    # ConvNeXts and other blocks that end in an MLP
    "convnext:ConvNeXtBlock": (
        row("{self.mlp(x)}", "mlp.fc2", when="use_conv_mlp"),
        row("{x.permute(0, 3, 1, 2)}", "mlp.fc2"),
    ),
    "maxxvit:ConvNeXtBlock": (
        row("{self.mlp(x)}", "mlp.fc2", when="use_conv_mlp"),
        row("{self.mlp(x)}", "mlp.fc2", nhwc=True),
    ),
    "inception_next:MetaNeXtBlock": (row("{self.mlp(x)}", "mlp.fc2"),),
    "fasternet:MLPBlock": (row("{self.mlp(x)}", "mlp.3"),),
    "starnet:Block": (row("{self.dwconv2(self.g(x))}", "dwconv2.conv"),),
    "convmixer:Residual": (row("{self.fn(x)}", "fn.2"),),
    "mambaout:GatedConvBlock": (row("{self.fc2(self.act(g) * torch.cat((i, c), dim=-1))}", "fc2", nhwc=True),),
    "csatv2:Block": (row("self.ls({x})", "pwconv2", scale=()),),
    "csatv2:PosConv": (row("{self.proj(cnn_feat)}", "proj"),),
    "edgenext:ConvBlock": (row("{self.mlp(x)}", "mlp.fc2", nhwc=True),),
    "efficientformer:MetaBlock2d": (row("{self.mlp(x)}", "mlp.norm2"),),
    "efficientformer_v2:EfficientFormerV2Block": (row("{self.mlp(x)}", "mlp.fc2.bn"),),
    "fastvit:RepMixerBlock": (row("{self.mlp(x)}", "mlp.fc2"),),
    "fastvit:RepMixer": (
        row("{self.mixer(x) - self.norm(x)}", "norm.identity", scale=(), when="norm.identity", where=_UNFUSED),
    ),
    "efficientvim:EfficientViMBlock": (
        row("{self.dwconv1(x)} - x", "dwconv1.norm", child="attn_dwconv1", where=_UNFUSED),
        row("{self.dwconv2(x)} - x", "dwconv2.norm", child="attn_dwconv2", where=_UNFUSED),
        row("{self.ffn(x)} - x", "ffn.fc2.norm"),
    ),
    "efficientvim:PatchMerging": (
        row("x + {self.dwconv1(x)}", "dwconv1.norm", child="attn_dwconv1", where=_UNFUSED),
        row("x + {self.dwconv2(x)}", "dwconv2.norm", child="attn_dwconv2", where=_UNFUSED),
    ),
    "maxxvit:TransformerBlock2d": (row("{self.mlp(self.norm2(x))}", "mlp.fc2"),),
    "nextvit:NextConvBlock": (
        row("{self.mhca(x)}", "mhca.projection", child="attn_mixer"),
        row("{self.mlp(out)}", "mlp.fc2"),
    ),
    "nextvit:NextTransformerBlock": (
        row("{self.mhca(out)}", "mhca.projection", child="attn_mixer"),
        row("{self.mlp(out)}", "mlp.fc2"),
    ),
    "swiftformer:Block": (row("{self.linear(x)}", "linear.fc2"),),
    "swiftformer:ConvEncoder": (row("{self.pwconv2(x)}", "pwconv2"),),
    "swiftformer:LocalRepresentation": (row("{self.pwconv2(x)}", "pwconv2"),),
    "visformer:Block": (row("{self.mlp(self.norm2(x))}", "mlp.conv3"),),
    "metaformer:MetaFormerBlock": (
        row(
            "{self.token_mixer(self.norm1(x))}",
            "token_mixer.pwconv2",
            child="attn_mixer",
            when="token_mixer.pwconv2.kernel_size",
        ),
        row("{self.mlp(self.norm2(x))}", "mlp.fc2", when="mlp.fc2.kernel_size"),
    ),
    # Blocks of other networks with residuals
    "repvit:RepViTBlock": (row("{self.channel_mixer(x)}", "channel_mixer.conv2.bn", se=("se",)),),
    "repvit:RepVggDw": (row("{self.conv(x) + self.conv1(x)}", "conv.bn", scale=(), where=_UNFUSED),),
    "repvit:RepVitDownsample": (row("{self.ffn(x)}", "ffn.conv2.bn"),),
    "hgnet:HighPerfGpuBlock": (
        row("{self.aggregation(x)}", "aggregation.1.bn", se=(), when="aggregation.1.bn"),
        row("{self.aggregation(x)}", "aggregation.0.bn", slot="aggregation.1", keep="{self.aggregation(x)}"),
    ),
    "vovnet:OsaBlock": (row("{self.conv_concat(x)}", "conv_concat.bn", slot="attn", keep="{self.attn(x)}"),),
    "inception_resnet_v2:Block35": (row("{self.conv2d(out)}", "conv2d"),),
    "inception_resnet_v2:Block17": (row("{self.conv2d(out)}", "conv2d"),),
    "inception_resnet_v2:Block8": (row("{self.conv2d(out)}", "conv2d"),),
    "xception:Block": (
        row("{self.rep(inp)}", "rep.-1", when="rep.-1.num_features"),
        row("{self.rep(inp)}", "rep.-2"),
    ),
    "xception_aligned:XceptionModule": (row(_XCEPTION, "stack.conv3.bn_pw"),),
    "xception_aligned:PreXceptionModule": (row(_XCEPTION, "stack.conv3.conv_pw"),),
    "efficientvit_mit:ResidualBlock": (
        row(
            "{self.main(self.pre_norm(x))}",
            "main.point_conv.conv",
            scale=("main.point_conv.norm",),
            when="main.point_conv",
        ),
        row("{self.main(self.pre_norm(x))}", "main.conv2.conv", scale=("main.conv2.norm",), when="main.conv2"),
    ),
    "lowformer:ResidualBlock": (
        row("{self.main(x)}", "main.point_conv.conv", scale=("main.point_conv.norm",), when="main.point_conv"),
        row("{self.main(x)}", "main.-2", when="main.-2.out_channels"),  # an MLP, then dropout
    ),
    "cpubone:ResidualBlock": (
        row("{self.main(x)}", "main.point_conv.conv", scale=("main.point_conv.norm",), when="main.point_conv"),
        row("{self.main(x)}", "main.-2", when="main.-2.out_channels"),  # an MLP, then dropout
    ),
    "efficientvit_msra:ResidualDrop": (
        row("{self.m(x)}", "m.bn", when="m.bn"),
        row("{self.m(x)}", "m.pw2.bn", when="m.pw2.bn"),
    ),
    "shvit:Residual": (
        row("{self.m(x)}", "m.bn", when="m.bn"),
        row("{self.m(x)}", "m.pw2.bn", when="m.pw2.bn"),
    ),
    "iformer:Residual": (row("{self.module(x)}", "module.-1.bn", when="module.-1.bn"),),
    "focalnet:FocalNetBlock": (
        row("{self.norm1_post(x)}", "norm1_post", child="attn_mixer", when="norm1_post.weight"),
        row("{self.norm1_post(x)}", "modulation.proj", child="attn_mixer"),
        row("{self.norm2_post(self.mlp(self.norm2(x)))}", "norm2_post", when="norm2_post.weight"),
        row("{self.norm2_post(self.mlp(self.norm2(x)))}", "mlp.fc2"),
    ),
    "davit:ConvPosEnc": (row("{self.proj(x)}", "proj"),),
    "levit:LevitBlock": (row("{self.mlp(x)}", "mlp.ln2.bn", when="mlp.ln2.linear.kernel_size"),),
    "levit:LevitDownsample": (row("{self.mlp(x)}", "mlp.ln2.bn", when="mlp.ln2.linear.kernel_size"),),
    # Networks without residual additions, or with cells that are graphs: one layer per block
    "pooling:MaxPool2d": (row("{input}", "<", scale=(), family="vgg"),),
    "selecsls:SelecSlsBlock": (
        row("{self.conv6(torch.cat([d1, d2, d3], 1))} | {self.conv6(torch.cat([d1, d2, d3, x[1]], 1))}", "conv6.1"),
    ),
    "nasnet:CellStem0": cell("conv_1x1.bn", 4),
    "nasnet:CellStem1": cell("conv_1x1.bn", 4),
    "nasnet:FirstCell": cell("conv_1x1.bn", 6),
    "nasnet:NormalCell": cell("conv_1x1.bn", 6),
    "nasnet:ReductionCell0": cell("conv_1x1.bn", 4),
    "nasnet:ReductionCell1": cell("conv_1x1.bn", 4),
    "pnasnet:CellStem0": cell("comb_iter_0_left.bn_sep_2", 5),
    "pnasnet:Cell": cell("comb_iter_0_left.bn_sep_2", 5),
    "densenet:DenseLayer": (row("{self.conv2(self.norm2(bottleneck_output))}", "conv2"),),
    "rdnet:DenseBlock": (
        row(
            "{self.layers(x)}",
            "layers.layers.4",
            slot="layers.layers.5",
            keep="{self.layers(x)}",
            when="layers.layers.5",
        ),
        row("{self.layers(x)}", "layers.layers.4"),
    ),
    "inception_v3:InceptionA": (
        row(_INCEPTION_V3, "branch1x1.bn", "branch5x5_2.bn", "branch3x3dbl_3.bn", "branch_pool.bn"),
    ),
    "inception_v3:InceptionC": (
        row(_INCEPTION_V3, "branch1x1.bn", "branch7x7_3.bn", "branch7x7dbl_5.bn", "branch_pool.bn"),
    ),
    "inception_v3:InceptionE": (
        row(
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
        row("{torch.cat((x0, x1, x2, x3), 1)}", "branch0.bn", "branch1.-1.bn", "branch2.-1.bn", "branch3.-1.bn"),
    ),
    "inception_v4:InceptionB": (
        row("{torch.cat((x0, x1, x2, x3), 1)}", "branch0.bn", "branch1.-1.bn", "branch2.-1.bn", "branch3.-1.bn"),
    ),
    "inception_v4:InceptionC": (
        row(
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
