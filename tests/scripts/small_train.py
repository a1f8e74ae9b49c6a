"""A small script that stands where timm's train.py would: it says what it was given, and does one thing."""

import json
import multiprocessing
import os
import signal
import sys

import timm
import torch


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index * index, timm.is_model("eca_resnet18")


def work(name):
    model = timm.create_model(name, attn_layer=None if name.startswith("eca") else "eca", device="meta")
    return os.getpid(), sum(p.numel() for p in model.parameters())


def tell():
    told = {"argv": sys.argv, "stdin": sys.stdin.read(), "timm": timm.__file__, "pid": os.getpid()}
    print(json.dumps(told | {"registered": timm.is_model("eca_resnet18"), "file": __file__}))


def workers(method):
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        pid, parameters = pool.apply(work, ["eca_resnet18"])
        _, placed = pool.apply(work, ["resnet18"])
    loader = torch.utils.data.DataLoader(Squares(), num_workers=1, multiprocessing_context=method)
    print(json.dumps({"child": pid != os.getpid(), "parameters": [parameters, placed], "loaded": repr(list(loader))}))


def wait():
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
    print("ready", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["exit", code]:
            sys.exit(int(code) if code.isdigit() else code)
        case ["raise"]:
            raise ZeroDivisionError("of the script")
        case ["workers", method]:
            workers(method)
        case ["wait"]:
            wait()
        case _:
            tell()
