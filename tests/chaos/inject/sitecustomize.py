"""Python imports this at the start of every process of a case, whose PYTHONPATH begins with this folder."""

from chaos.injection import install_in_interpreter

install_in_interpreter()
