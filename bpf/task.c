// SPDX-License-Identifier: GPL-2.0-only
/*
 * handle_task: who has the CPU, told while the task is there. User space could
 * ask /proc, but reading that may wait for the very task that is stuck, and
 * the task may be gone by then. Each part is compiled in where the kernel has
 * the fields it needs (stalld/probe/headers.py), and each may fail by itself.
 */
/* Where in a kernfs node or a dentry its parent and its name are. */
#ifdef STALLD_WHO_CGROUP
#define KERNFS_PARENT offsetof(struct kernfs_node, STALLD_KERNFS_PARENT)
#define KERNFS_NAME offsetof(struct kernfs_node, name)
#else
#define KERNFS_PARENT 0
#define KERNFS_NAME 0
#endif
#if defined(STALLD_WHO_EXE) || defined(STALLD_WHO_FILE)
#define DENTRY_PARENT offsetof(struct dentry, d_parent)
#define DENTRY_NAME offsetof(struct dentry, d_name_name)
#else
#define DENTRY_PARENT 0
#define DENTRY_NAME 0
#endif

static __always_inline u64 read_pointer(u64 at)
{
	u64 pointer = 0;

	bpf_probe_read_kernel(&pointer, sizeof(pointer), (void *)at);
	return pointer;
}

/*
 * The names of all paths. One copy for both kinds, and loops that stay loops:
 * compiling takes long enough.
 */
static __always_inline void fill_names(struct task_record *rec, u64 *nodes)
{
	u32 path, depth, at, parent_at, name_at;
	u64 node, parent, name;
	long bytes;

#pragma clang loop unroll(disable)
	for (path = 0; path < PATH_COUNT; path++) {
		parent_at = path < PATH_EXE ? KERNFS_PARENT : DENTRY_PARENT;
		name_at = path < PATH_EXE ? KERNFS_NAME : DENTRY_NAME;
		node = nodes[path];
		if (!node)
			continue;
#pragma clang loop unroll(disable)
		for (depth = 0; depth < PATH_DEPTH; depth++) {
			/* kernfs: the root has no parent, and no name. */
			parent = read_pointer(node + parent_at);
			/* Others: it is its own parent, as is what has no path. */
			if (!parent || (parent == node && depth))
				break;
			name = read_pointer(node + name_at);
			/* In memory: the verifier does not follow each value that it may have. */
			at = rec->names_bytes;
			opaque(at);
			bytes = 0;
			if (at < NAMES_LEN - NAME_LEN)
				bytes = bpf_probe_read_kernel_str(rec->names + at, NAME_LEN,
								  (void *)name);
			if (bytes <= 0) {
				rec->paths_cut |= 1 << path;
				break;
			}
			rec->names_bytes += bytes;
			rec->path_names[path] = depth + 1;
			node = parent;
		}
		if (depth < PATH_DEPTH)
			continue;
		parent = read_pointer(node + parent_at);
		if (parent && parent != node)
			rec->paths_cut |= 1 << path;
	}
}

#ifdef STALLD_WHO_CGROUP
static __always_inline void find_cgroup(struct task_record *rec, struct task_struct *task,
					u64 *nodes)
{
	struct cgroup *unified = NULL, *other = NULL;
	struct cgroup_subsys_state *css = NULL;
	u64 unified_root = 0, other_root = 0;
	struct css_set *set = NULL;

	READ(set, task, cgroups);
	READ(unified, set, dfl_cgrp);
	READ(nodes[PATH_CGROUP], unified, kn);
	if (!nodes[PATH_CGROUP])
		return;
	rec->known |= KNOWN_CGROUP;
	/* The memory controller's, or the cpu controller's: runtimes use both. */
	bpf_probe_read_kernel(&css, sizeof(css), &set->subsys[STALLD_CONTROLLER]);
	READ(other, css, cgroup);
	READ(unified_root, unified, root);
	READ(other_root, other, root);
	if (other_root != unified_root)
		READ(nodes[PATH_CONTROLLER], other, kn);
}
#endif

#ifdef STALLD_WHO_FILE
/* The registers that user code had when it entered the kernel lie at the stack's far end. */
#define STACK_SIZE (16 << 10)
#define X86_EFLAGS_USER 0x202 /* always one, interrupts enabled */
/* Of these two words, FRED needs them (commit 65c9cc9e2c14, 6.9). */
#define FRED_PADDING 16
#define TS_COMPAT 2

/* struct pt_regs from di on: what is looked at, whichever names the rest has. */
struct entry_registers {
	u64 di;
	u64 orig_ax;
	u64 ip;
	u64 cs;
	u64 flags;
	u64 sp;
	u64 ss;
};

static __always_inline bool find_registers(struct task_struct *task, struct entry_registers *regs)
{
	u64 end = 0;
	int i;

	READ(end, task, stack);
	end += STACK_SIZE - sizeof(*regs);
#pragma clang loop unroll(disable)
	for (i = 0; i < 2; i++) {
		bpf_probe_read_kernel(regs, sizeof(*regs), (void *)end);
		if ((regs->cs & 3) == 3 && (regs->ss & 3) == 3 &&
		    (regs->flags & X86_EFLAGS_USER) == X86_EFLAGS_USER && !(regs->ip >> 63))
			return true;
		end -= FRED_PADDING;
	}
	return false;
}

static __always_inline void find_file(struct task_record *rec, struct task_struct *task, u64 fd,
				      u64 *node)
{
	struct files_struct *files = NULL;
	struct file_system_type *kind = NULL;
	struct super_block *super = NULL;
	struct dentry *dentry = NULL;
	struct fdtable *table = NULL;
	struct inode *inode = NULL;
	struct file *file = NULL;
	const char *name = NULL;
	void **slots = NULL;
	u32 count = 0;

	READ(files, task, files);
	READ(table, files, fdt);
	READ(count, table, max_fds);
	if ((u32)fd >= count)
		return;
	READ(slots, table, fd);
	bpf_probe_read_kernel(&file, sizeof(file), slots + (u32)fd);
	READ(dentry, file, f_path_dentry);
	READ(super, dentry, d_sb);
	READ(kind, super, s_type);
	READ(name, kind, name);
	if (!name)
		return;
	bpf_probe_read_kernel_str(rec->file_system, sizeof(rec->file_system), name);
	READ(inode, file, f_inode);
	READ(rec->file_inode, inode, i_ino);
	READ(*node, file, f_path_dentry);
}

static __always_inline void fill_syscall(struct task_record *rec, struct task_struct *task,
					 u64 *node)
{
	struct entry_registers regs = {};
	u32 status = 0;

	READ(status, task, thread_info_status);
	/* -1 after an interrupt or an exception; calls of 32-bit code have other numbers. */
	if (!find_registers(task, &regs) || (s64)regs.orig_ax < 0 || status & TS_COMPAT)
		return;
	rec->syscall = regs.orig_ax;
	rec->known |= KNOWN_SYSCALL;
	find_file(rec, task, regs.di, node);
}
#endif

#ifdef STALLD_WHO_COMMAND
/* By its number: at the name bcc would read all of the kernel's symbols, for 50 ms. */
static long (*read_user)(void *to, u32 size, const void *from) = (void *)112;

static __always_inline void fill_args(struct task_record *rec, struct task_struct *task)
{
	struct mm_struct *mm = NULL;
	u64 start = 0, bytes = 0;

	READ(mm, task, mm);
	READ(start, mm, arg_start);
	READ(bytes, mm, arg_end);
	bytes -= start;
	if (!start || bytes > 1 << 30)
		return;
	rec->args_total = bytes;
	if (bytes > ARGS_LEN)
		bytes = ARGS_LEN;
	/* Fails where it would have to be fetched from disk. */
	if (read_user(rec->args, bytes, (void *)start))
		return;
	rec->args_bytes = bytes;
	rec->known |= KNOWN_ARGS;
}
#endif

static __always_inline void fill_relatives(struct task_record *rec, struct task_struct *task)
{
#ifdef STALLD_WHO_PARENT
	struct task_struct *parent = NULL;

	READ(parent, task, real_parent);
	READ(rec->parent_pid, parent, tgid);
	bpf_probe_read_kernel_str(rec->parent_comm, sizeof(rec->parent_comm), &parent->comm);
#endif
#ifdef STALLD_WHO_NS_PID
	struct task_struct *leader = NULL;
	struct pid *pid = NULL;
	u32 level = 0;

	READ(leader, task, group_leader);
	READ(pid, leader, thread_pid);
	READ(level, pid, level);
	/* struct upid: nr and the namespace. */
	if (level && level < 32)
		bpf_probe_read_kernel(&rec->ns_pid, sizeof(rec->ns_pid),
				      (char *)&pid->numbers + level * 16);
#endif
}

int handle_task(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct cpu_state *st = this_cpu_state();
	u64 id = bpf_get_current_pid_tgid();
	struct stall_record *stall;
	struct task_record *rec;
	u64 nodes[PATH_COUNT] = {};
	u32 source, bytes;

	if (!st)
		return 0;
	source = st->source;
	stall = scratch.lookup(&source);
	rec = task_scratch.lookup(&source);
	if (!stall || !rec)
		return 0;
	__builtin_memset(rec, 0, offsetof(struct task_record, args));
	rec->type = RECORD_TASK;
	rec->source = source;
	rec->cpu = bpf_get_smp_processor_id();
	rec->seq = stall->seq;
	rec->time_ns = stall->time_ns;
	rec->tgid = id >> 32;
	rec->tid = id;
	rec->uid = bpf_get_current_uid_gid();
	READ(rec->task_flags, task, flags);
	fill_relatives(rec, task);
#ifdef STALLD_WHO_CGROUP
	find_cgroup(rec, task, nodes);
#endif
	if (!(rec->task_flags & PF_KTHREAD)) {
#ifdef STALLD_WHO_COMMAND
		fill_args(rec, task);
#endif
#ifdef STALLD_WHO_EXE
		struct mm_struct *mm = NULL;
		struct file *file = NULL;

		READ(mm, task, mm);
		READ(file, mm, exe_file);
		READ(nodes[PATH_EXE], file, f_path_dentry);
#endif
#ifdef STALLD_WHO_FILE
		fill_syscall(rec, task, &nodes[PATH_FILE]);
#endif
	}
	fill_names(rec, nodes);
	bytes = rec->names_bytes;
	opaque(bytes);
	/* The mask changes nothing; it shows the verifier the bound. */
	bytes &= NAMES_LEN - 1;
	if (events.perf_submit(ctx, rec, offsetof(struct task_record, names) + bytes))
		st->lost++;
	else
		st->told_task = (u64)stall->seq << 32 | (u32)id;
	tails.call(ctx, TAIL_EMIT);
	st->source = stall->source;
	return 0;
}
