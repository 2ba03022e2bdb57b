"""Export a policy as a teacher: an ONNX file for distill.py --teachers. Three kinds of it:

A Stable-Baselines3 PPO, trained here (pip install stable-baselines3==2.9.2):

    python examples/onnx_teacher.py policy.onnx --env Hopper-v5 --steps 1000000
    python distill.py --datasets mujoco/hopper/medium-v0 --teachers policy.onnx

A hand-written controller, here of CartPole:

    python examples/onnx_teacher.py balance.onnx --controller
    python distill.py --datasets cartpole/mixed-v0 --teachers balance.onnx   # of examples/collect_cartpole.py

PyTorch modules of your own, here of CleanRL's ppo_continuous_action.py, at its end (in ppo.py: agent.actor):

    rms = envs.envs[0].get_wrapper_attr("obs_rms")
    export(Actor(agent.actor_mean, agent.actor_logstd, rms), "policy.onnx", rms.mean.size)
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Actor(torch.nn.Module):
    """The mean and log-std of a PPO's Gaussian policy, or the logits of a categorical one."""

    def __init__(self, network: torch.nn.Module, log_std: Tensor | None = None, rms: Any = None):
        """network: observations (B, O), normalised -> means (B, A), or logits (B, n).

        log_std (A,) or (1, A); None: logits. rms: has the observations' mean and var (O,), as VecNormalize
        and gymnasium's NormalizeObservation have; None: the network takes them as they are.
        """
        super().__init__()
        self.network = network
        self.log_std = log_std
        self.normalises = rms is not None
        if self.normalises:
            self.register_buffer("obs_mean", torch.as_tensor(rms.mean, dtype=torch.float32))
            self.register_buffer("obs_std", torch.as_tensor(rms.var + 1e-8, dtype=torch.float32).sqrt())

    def forward(self, observation: Tensor) -> tuple[Tensor, ...]:
        """(B, O) -> mean and log_std, each (B, A); or logits (B, n)."""
        x = observation
        if self.normalises:
            x = ((x - self.obs_mean) / self.obs_std).clamp(-10, 10)  # as in both libraries' trainings
        y = self.network(x)
        return (y,) if self.log_std is None else (y, self.log_std.expand_as(y))


class Controller(torch.nn.Module):
    """A linear controller of CartPole, that of examples/collect_cartpole.py."""

    def forward(self, observation: Tensor) -> tuple[Tensor]:
        """(B, 4) -> logits (B, 2) of a push to the left and to the right."""
        position, velocity, angle, angular_velocity = observation.unbind(1)
        push = angle + 0.3 * angular_velocity + 0.05 * position + 0.1 * velocity
        return (torch.stack((-push, push), 1) * 100,)  # steep: it is hardly ever in doubt


def export(actor: torch.nn.Module, path: Path | str, observations: int) -> None:
    """Write an actor from `observations` numbers as one ONNX file, for batches of any size."""
    actor = torch.nn.Sequential(actor).cpu().eval()  # no parameter's name is then that of an output
    example = torch.zeros(2, observations)
    torch.onnx.export(
        actor,
        (example,),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["observation"],
        output_names=["mean", "log_std"] if len(actor(example)) == 2 else ["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def trained_ppo(args: argparse.Namespace) -> tuple[Actor, int]:
    """A Stable-Baselines3 PPO, and the size of its observations."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    vec = VecNormalize(make_vec_env(args.env, n_envs=16, seed=args.seed))
    ppo = PPO("MlpPolicy", vec, n_steps=256, batch_size=256, seed=args.seed, device="cpu")
    ppo.learn(args.steps)
    return actor_of_ppo(ppo.policy, vec.obs_rms), vec.obs_rms.mean.size


def actor_of_ppo(policy: torch.nn.Module, rms: Any) -> Actor:
    """policy: Stable-Baselines3's ActorCriticPolicy of vectors."""
    network = torch.nn.Sequential(policy.mlp_extractor.policy_net, policy.action_net)
    return Actor(network, getattr(policy, "log_std", None), rms)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", help="to write")
    parser.add_argument("--controller", action="store_true", help="of CartPole, in place of a PPO")
    parser.add_argument("--env", default="Hopper-v5", help="PPO: Gymnasium's id; observations are vectors")
    parser.add_argument("--steps", type=int, default=1_000_000, help="PPO: of the environment")
    parser.add_argument("--seed", type=int, default=0, help="PPO")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    actor, observations = (Controller(), 4) if args.controller else trained_ppo(args)
    export(actor, args.file, observations)
