// Every part of the page has something to show: both phases, a target band, KL and resets.
export const RUN = `
name = "page-test"
seed = 4
[model]
preset = "nano"
context = 64
[[task]]
family = "count_bits"
level = 1
[sft]
steps = 30
batch = 32
[sft.optimizer]
learning_rate = 3e-3
[rl]
steps = 8
prompts = 4
group_size = 8
max_new_tokens = 16
[rl.learn.loss.kl]
estimator = "k2"
beta = 1e-3
[rl.learn.entropy]
low = 0.2
high = 0.5
[rl.learn.reset]
every_steps = 4
[rl.learn.optimizer]
learning_rate = 1e-3
[eval]
problems = 8
samples = 4
k = [1, 4]
every = 10
[checkpoint]
every = 10
[swarm]
unit_seconds = 0.2
newcomer_audits = 3
silence_seconds = 5.0
`;
