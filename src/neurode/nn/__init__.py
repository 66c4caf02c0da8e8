"""Layers and models without fixed depth, on top of `neurode.solve`."""

from neurode.nn.augment import Augment, Lift
from neurode.nn.depth import DepthReport, check_depth
from neurode.nn.mlp import MLP
from neurode.nn.neural_ode import NeuralODE
from neurode.nn.resnet import ResNet, as_resnet

__all__ = ["MLP", "Augment", "DepthReport", "Lift", "NeuralODE", "ResNet", "as_resnet", "check_depth"]
