"""A small script that stands where timm's validate.py and benchmark.py would: prints a result as they do."""

import argparse
import json
import os
import signal
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default=[])
args, _ = parser.parse_known_args()
step = Path(__file__).stem
row = " ".join([step, args.model, *args.model_kwargs])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(row + "\n")
if row == os.environ.get("KILL_AT"):
    os.kill(os.getppid(), signal.SIGKILL)
if row == os.environ.get("FAIL_AT"):
    raise RuntimeError("out of memory")
if step == "validate":
    told = {"top1": 70.5, "top1_err": 29.5, "top5": 90.0, "top5_err": 10.0, "param_count": 11.69}
    told |= {"img_size": 32, "crop_pct": 1.0, "interpolation": "bilinear"}
else:
    told = {"infer_samples_per_sec": 100.0, "infer_step_time": 10.0, "infer_batch_size": 1, "infer_img_size": 32}
    told |= {"train_samples_per_sec": 50.0, "train_step_time": 20.0, "train_batch_size": 1, "train_img_size": 32}
    told |= {"param_count": 11.7}
print(f"--result\n{json.dumps({'model': args.model, **told}, indent=4)}")
