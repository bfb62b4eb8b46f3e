"""``python -m megaegpt``, for launchers: ``torchrun -m megaegpt pretrain ...``"""

from megaegpt.subcommands import main

main()
