"""Prepare a training set: ``tools/prepare_data.py --config-name prepare_sft dir=DIR 'data.sources=[{path: FILE}]'``.

``--help`` prints every setting; `docs/data.md` describes the stages.
"""

if __name__ == "__main__":  # worker processes import this file and need none of it
    from ovr_megatron.curation.command import main
    from ovr_megatron.runtime.command import run_command

    run_command(main)
