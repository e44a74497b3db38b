// SPDX-License-Identifier: GPL-2.0-only
/*
 * Task iterator: tells user space pid, name and task pointer of every kernel
 * thread, so that the hot path compares pointers and reads no memory. Of other
 * tasks it tells a few: a read() ends where enough was told, and on kernels
 * before 5.11 the CPU is given to nobody until it does.
 */
#define OTHERS 256

#ifdef STALLD_STRUCTS_FROM_BTF
int bpf_iter__task(struct bpf_iter__task *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct task_struct *task = ctx->task;
	struct task_entry entry = {};

	if (!task || (!(task->flags & PF_KTHREAD) && ctx->meta->seq_num % OTHERS))
		return 0;
	entry.task = (u64)task;
	entry.pid = task->pid;
	entry.flags = task->flags;
	entry.cpus_allowed = task->nr_cpus_allowed;
	entry.cpu = task->wake_cpu;
	bpf_probe_read_kernel(entry.comm, sizeof(entry.comm), task->comm);
	bpf_seq_write(seq, &entry, sizeof(entry));
	return 0;
}
#endif
