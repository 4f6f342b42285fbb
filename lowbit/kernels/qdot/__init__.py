"""`qdot(x, w)`: the one matrix product of the model, whatever the weight is stored as."""

from lowbit.kernels.qdot.api import qdot as qdot
