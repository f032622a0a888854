"""``python -m ovr_megatron`` is ``ovr``: for ``torchrun`` and ``srun``, and where no scripts are installed."""

from ovr_megatron.cli import script

if __name__ == "__main__":
    script()
