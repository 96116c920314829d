"""The benchmarks' networks, untrained, as plain modules. One file each; this list names them."""

from .cnn import cifar_cnn, cnn
from .mlp import mlp
from .reader import RowReader
from .resnet import ResNet
from .transformer import Transformer

__all__ = ["ResNet", "RowReader", "Transformer", "cifar_cnn", "cnn", "mlp"]
