"""ECA under torchrun with gloo on CPU, on one machine and as two nodes: a small script, three steps in float64."""

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm

import small_ddp
from conftest import randomize_
from small_checkout import make_checkout, meeting_point, start
from timm_eca import attn_modules


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("ddp") / "checkout", script="small_ddp.py")


def weights_of(folder, rank):
    return torch.load(folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the summed batch."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        patch.delenv("WORLD_SIZE", raising=False)
        small_ddp.main(folder)
    return weights_of(folder, 0)


def torchrun(checkout, out, *options):
    arguments = [*options, "-m", "timm_eca.scripts", "train", out]
    env = {"TIMM_SCRIPTS": str(checkout), "RANK": "", "WORLD_SIZE": ""}
    return start(*arguments, module="torch.distributed.run", env=env, cwd=checkout)


def one_machine(checkout, out):
    return [torchrun(checkout, out, "--standalone", "--nproc_per_node=2")]


def two_nodes(checkout, out):
    meet = meeting_point()
    return [torchrun(checkout, out, *meet) for _ in range(2)]


@pytest.mark.parametrize("launch", [one_machine, two_nodes])
def test_two_processes(launch, checkout, alone, tmp_path):
    processes = launch(checkout, tmp_path)
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    ranks = [weights_of(tmp_path, rank) for rank in (0, 1)]
    for norm in ("groupnorm", "batchnorm", "sync-bn"):
        first, second = (rank[norm]["weights"] for rank in ranks)
        for key, weight in first.items():
            # batch norm's statistics are of the last step, not yet sent round
            own = norm == "batchnorm" and key.endswith(("running_mean", "running_var"))
            assert own or torch.equal(weight, second[key]), key
        assert not torch.equal(*(rank[norm]["losses"] for rank in ranks))
    for norm in ("groupnorm", "sync-bn"):
        summed = alone[norm]
        losses = torch.stack([rank[norm]["losses"] for rank in ranks]).mean(0)
        torch.testing.assert_close(losses, summed["losses"], rtol=1e-9, atol=0)
        for key, weight in ranks[0][norm]["weights"].items():
            torch.testing.assert_close(weight, summed["weights"][key], rtol=1e-7, atol=1e-9)
        assert sum(".se.conv." in key for key in summed["weights"]) == 8


def test_sync_bn_keeps_the_layers():
    """What `--sync-bn` does to a model."""
    model = randomize_(timm.create_model("eca_resnet18", num_classes=4)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    paths = list(attn_modules(model))
    synced = convert_sync_batchnorm(model)
    assert list(attn_modules(synced)) == paths
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in synced.modules()) == 20
    torch.testing.assert_close(synced(images), expected, rtol=0, atol=0)


def test_ddp_on_the_cpu_takes_device_ids():
    """train.py names the device in any case; torch's own DDP refuses it for a model on the CPU."""
    from timm_eca.scripts.cpu_ddp import CpuDistributedDataParallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = timm.create_model("eca_resnet18")
        with pytest.raises(ValueError, match="device_ids"):
            super(CpuDistributedDataParallel, CpuDistributedDataParallel).__init__(
                CpuDistributedDataParallel.__new__(CpuDistributedDataParallel), model, device_ids=[torch.device("cpu")]
            )
        wrapped = CpuDistributedDataParallel(model, device_ids=[torch.device("cpu")])
        assert torch.nn.parallel.DistributedDataParallel is CpuDistributedDataParallel
        assert wrapped.module is model
    finally:
        torch.distributed.destroy_process_group()
