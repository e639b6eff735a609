"""What is trained: the losses, figures, pictures and results of a VAE, a DALLE and a CLIP, for `training.trainer`."""
