"""Run ``ovr prepare``, which `ovr_megatron.curation.command` describes."""

if __name__ == "__main__":  # worker processes import this file and need none of it
    from ovr_megatron.curation.command import main
    from ovr_megatron.runtime.command import run_command

    run_command(main)
