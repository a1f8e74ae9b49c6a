"""Write one folder per released model: its config.json in timm's schema and its model card.

Everything comes from the registered models and the paper's data (`timm_eca/paper_tables.json`):
`python hub_configs/generate.py [FOLDER]`, or `make hub-configs`.
"""

import sys
from pathlib import Path

import timm

from timm_eca import hub
from timm_eca.cards import model_card
from timm_eca.models.released import RELEASED


def write_all(root: Path) -> list[Path]:
    """Write the folders, named as the models are published, and return them."""
    return [_write(root, name) for name in RELEASED]


def _write(root: Path, name: str) -> Path:
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    folder = root / f"{cfg['architecture']}.{cfg['tag']}"
    folder.mkdir(parents=True, exist_ok=True)
    config = hub.describe(model, portable=False)
    parameters = sum(p.numel() for p in model.parameters())
    hub.write_folder(folder, config, model_card(folder.name, config, parameters, released=name))
    return folder


if __name__ == "__main__":
    for written in write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(written)
