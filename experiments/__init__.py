"""Robots, studies and analyses around the policy."""

from prismatic.util.moved import keep_earlier_names

_LIBERO = "experiments.robot.libero"
_ROOMS = {
    "simulator": ("control", "environment", "rendering"),
    "suites": ("perturbations", "plus", "tasks"),
    "rollouts": ("episode", "plan", "protocol", "rollout", "workers"),
    "results": ("summary",),
}
_MAKE = (
    "make_tokenizer", "pretrain_student", "teacher_data", "teacher_frames", "teacher_model", "train_teacher",
)  # fmt: skip

keep_earlier_names(
    {f"{_LIBERO}.{name}": f"{_LIBERO}.{room}.{name}" for room, names in _ROOMS.items() for name in names}
    | {f"experiments.mini.{name}": f"experiments.mini.make.{name}" for name in _MAKE}
    | {
        f"{_LIBERO}.completeness": f"{_LIBERO}.results.merge",
        f"{_LIBERO}.results.planned": f"{_LIBERO}.results.merge",
        f"{_LIBERO}.decimation": f"{_LIBERO}.simulator.decimation",
        f"{_LIBERO}.plus_plan": f"{_LIBERO}.rollouts.plan",
        f"{_LIBERO}.plus_scene": f"{_LIBERO}.suites.perturbations",
        f"{_LIBERO}.plus_summary": f"{_LIBERO}.results.summary",
        f"{_LIBERO}.progress": f"{_LIBERO}.rollouts.result",
        f"{_LIBERO}.merge_results": f"{_LIBERO}.results.merge",
        f"{_LIBERO}.results_page": f"{_LIBERO}.results.page",
        "experiments.analysis.cone": "experiments.analysis.cosines",
        "experiments.analysis.projectors": "experiments.analysis.cosines",
        "experiments.analysis.settings": "experiments.analysis.config",
        "experiments.analysis.subject": "experiments.analysis.loaded_checkpoint",
        "experiments.analysis.theorem": "experiments.analysis.gradients",
        "experiments.robot.checkpoint": "prismatic.checkpoint.folder",
        "experiments.robot.deterministic": "experiments.robot.wrappers",
        "experiments.robot.model_card": "experiments.robot.publish",
        "experiments.robot.policy_flags": "experiments.robot.policy",
        "experiments.robot.quantization": "experiments.robot.openvla_utils",
        "experiments.robot.serving.websocket_client": "experiments.robot.serving.client",
        "experiments.robot.time_limit": "experiments.robot.wrappers",
        "experiments.jobs": "experiments.reproduce.jobs",
        "experiments.mini.demo": "experiments.reproduce.demo",
        "experiments.mini.make.teacher_config": "experiments.mini.make.teacher_data",
        "experiments.store_config": "experiments.join",
        "experiments.mini.geometry": "experiments.mini.grasp",
        "experiments.mini.student_config": "experiments.mini.make.pretrain_student",
        "experiments.mini.teacher_readout": "experiments.mini.make.teacher_model",
        "experiments.mini.demo_report": "experiments.reproduce.demo",
        "experiments.report.settings": "experiments.report.html",
        "experiments.report.training_page": "experiments.reproduce.training_page",
        "experiments.mini.demonstrate": "experiments.mini.expert",
        "experiments.reproduce.sections": "experiments.reproduce.report",
        "experiments.reproduce.outcomes": "experiments.reproduce.records",
        "experiments.reproduce.arms": "experiments.reproduce.studies",
    }
)
