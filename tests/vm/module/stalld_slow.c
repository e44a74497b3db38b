// SPDX-License-Identifier: GPL-2.0-only
/*
 * Slow system calls for tests: reading a file of /proc/stalld_slow spins in the
 * kernel for a bounded time, as reading memory.stat did in memcg_stat_show().
 *
 *   slow_stat    preemption off: the kernel does not reschedule inside it
 *   slow_bh      bottom halves off
 *   slow_irqs    interrupts off
 *
 * The file's text tells when it spun, in CLOCK_MONOTONIC nanoseconds, and where.
 */
#include <linux/bottom_half.h>
#include <linux/irqflags.h>
#include <linux/ktime.h>
#include <linux/module.h>
#include <linux/preempt.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/smp.h>

#define MAX_DURATION_MS 500

static unsigned int duration_ms = 100;
module_param(duration_ms, uint, 0644);
MODULE_PARM_DESC(duration_ms, "how long a read spins, at most 500");

/* A loop of its own, so that it has a frame in the stack. */
static noinline void stalld_slow_walk(struct seq_file *seq)
{
	unsigned int bounded_ms = min_t(unsigned int, READ_ONCE(duration_ms), MAX_DURATION_MS);
	u64 start_ns = ktime_get_ns();
	u64 until_ns = start_ns + (u64)bounded_ms * NSEC_PER_MSEC;

	while (ktime_get_ns() < until_ns)
		cpu_relax();
	seq_printf(seq, "%llu %llu %u\n", start_ns, ktime_get_ns(), raw_smp_processor_id());
}

static noinline int stalld_slow_stat_show(struct seq_file *seq, void *unused)
{
	preempt_disable();
	stalld_slow_walk(seq);
	preempt_enable();
	return 0;
}

static noinline int stalld_slow_bh_show(struct seq_file *seq, void *unused)
{
	local_bh_disable();
	stalld_slow_walk(seq);
	local_bh_enable();
	return 0;
}

static noinline int stalld_slow_irqs_show(struct seq_file *seq, void *unused)
{
	unsigned long flags;

	local_irq_save(flags);
	stalld_slow_walk(seq);
	local_irq_restore(flags);
	return 0;
}

static int __init stalld_slow_init(void)
{
	struct proc_dir_entry *directory = proc_mkdir("stalld_slow", NULL);

	if (!directory)
		return -ENOMEM;
	if (!proc_create_single("slow_stat", 0400, directory, stalld_slow_stat_show) ||
	    !proc_create_single("slow_bh", 0400, directory, stalld_slow_bh_show) ||
	    !proc_create_single("slow_irqs", 0400, directory, stalld_slow_irqs_show)) {
		proc_remove(directory);
		return -ENOMEM;
	}
	return 0;
}

static void __exit stalld_slow_exit(void)
{
	remove_proc_subtree("stalld_slow", NULL);
}

module_init(stalld_slow_init);
module_exit(stalld_slow_exit);
MODULE_DESCRIPTION("Bounded slow system calls, for the tests of softirq-stalld");
MODULE_LICENSE("GPL");
