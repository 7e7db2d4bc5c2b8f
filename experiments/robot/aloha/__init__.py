"""Two arms: gym-aloha's simulated ALOHA, as a suite of the LIBERO harness."""

GYM_ALOHA = "gym_aloha"  # Name of the suite and of its dataset
