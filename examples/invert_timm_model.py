"""Invert a timm model into images, without federated learning.

    python examples/invert_timm_model.py

The program first trains a small ViT on scikit-learn's digits and then inverts it; this takes some seconds. If you have
a trained model, start at `invert_model`. It accepts any timm ViT with a [CLS] token.
"""

from pathlib import Path

import torch
from torchvision.utils import save_image

import fedmitr_flwr as fm

OUTPUT = Path("inverted.png")


def main() -> None:
    """Train a ViT, invert it and write the images as one picture."""
    settings = fm.Settings.from_run_config(
        {
            "data.source": "digits",
            "model.options": "patch_size=2,embed_dim=32,depth=2,num_heads=2",
            "model.init": "seeded",
            "train.min-steps": 200,
        }
    )
    source = fm.load_source(settings.data)
    model = fm.build_model(settings.model, source.spec)
    model.load_state_dict(fm.initial_state(settings, source.spec))
    fm.train_local(model, source.train, source.spec, settings.train, seed=0, device=torch.device("cpu"))

    schedule = fm.InversionSettings(iterations=60, stops=(10, 20), fractions=(0.3, 0.3))
    synthetic = fm.invert_model(model, labels=range(10), settings=schedule, spec=source.spec, seed=1)

    patches = (source.spec.image_size // 2) ** 2
    print(
        f"cross-entropy {synthetic.loss.mean():.3f}, {synthetic.kept.shape[1]} of {patches} patches inverted to the end"
    )
    save_image(source.spec.denormalise(synthetic.images).float() / 255, OUTPUT, nrow=10)
    print(OUTPUT.absolute())


if __name__ == "__main__":
    main()
