// Package process runs the programs that integration tests and benchmarks work
// with: it keeps what they print, waits until they are ready, and ends them
// with everything that they started.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopTimeout is how long Stop waits for a program to end by itself.
const stopTimeout = 10 * time.Second

// tailSize is how much of a program's newest output is kept, in bytes.
const tailSize = 256 << 10

// ErrMissing means that a program is not installed. The error's text says how
// to install it.
var ErrMissing = errors.New("not installed")

// ErrExited means that a program ended before it was ready.
var ErrExited = errors.New("ended early")

// Config says what to run.
type Config struct {
	// Name stands in errors and logs. Default: the base name of Path.
	Name string
	// Path of the program; a bare name is looked up in PATH and the sbin
	// directories.
	Path string
	// Args are its arguments.
	Args []string
	// Dir is its working directory. Default: the caller's.
	Dir string
	// Env is added to the caller's environment.
	Env []string
	// Install says what to do when Path does not exist. Default:
	// "run integration/setup.sh".
	Install string
	// OnLine is called with each line that it prints to stdout or stderr, from
	// one goroutine at a time. Lines for which it returns false are not kept.
	OnLine func(line string) bool
	// Network is where it runs. Default: where this process does.
	Network *Network
}

// Process is a running program. Its methods may be called from any goroutine.
type Process struct {
	name   string
	cmd    *exec.Cmd
	output *output
	done   chan struct{}

	// Set before done is closed.
	err     error
	orphans []int
}

// Find is the path of an installed program, or ErrMissing with install in its
// text.
func Find(program, install string) (string, error) {
	if install == "" {
		install = "run integration/setup.sh"
	}
	if path, err := exec.LookPath(program); err == nil {
		return path, nil
	}
	if !strings.Contains(program, "/") {
		for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
			if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("%s: %w: %s", program, ErrMissing, install)
}

// Start runs a program in a process group of its own. It is killed when this
// process dies.
func Start(config Config) (*Process, error) {
	path, err := Find(config.Path, config.Install)
	if err != nil {
		return nil, err
	}
	name := config.Name
	if name == "" {
		name = filepath.Base(config.Path)
	}
	p := &Process{name: name, output: &output{onLine: config.OnLine}, done: make(chan struct{})}
	p.cmd = exec.Command(path, config.Args...)
	p.cmd.Dir = config.Dir
	p.cmd.Env = append(os.Environ(), config.Env...)
	p.cmd.Stdout = p.output
	p.cmd.Stderr = p.output
	p.cmd.WaitDelay = 2 * time.Second
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go p.run(config.Network, started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

// run starts the program and waits for its end on one thread, since Pdeathsig
// is sent when the thread that started the child ends.
func (p *Process) run(network *Network, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start := p.cmd.Start
	if network != nil {
		// A child is in the namespace of the thread that starts it.
		start = func() error { return network.within(p.cmd.Start) }
	}
	if err := start(); err != nil {
		started <- err
		return
	}
	started <- nil
	// While the leader is not reaped its process group can't be another's.
	var info unix.Siginfo
	for unix.Waitid(unix.P_PID, p.cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.orphans = groupMembers(p.cmd.Process.Pid)
	if len(p.orphans) > 0 {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
	p.err = p.cmd.Wait()
	p.output.flush()
	close(p.done)
}

// PID is the program's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Name is the name from Config.
func (p *Process) Name() string { return p.name }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how the program ended: nil for exit status 0, otherwise an *exec.ExitError.
// It waits for the end.
func (p *Process) Err() error {
	<-p.done
	return p.err
}

// Orphans are the ids of processes that the program had started and left
// behind in its process group. They have been killed. It waits for the end.
func (p *Process) Orphans() []int {
	<-p.done
	return p.orphans
}

// Output is the newest part of what the program printed.
func (p *Process) Output() string { return p.output.String() }

// Signal sends a signal to the program alone. Nothing happens when it has
// ended.
func (p *Process) Signal(signal os.Signal) {
	select {
	case <-p.done:
	default:
		_ = p.cmd.Process.Signal(signal)
	}
}

// Kill ends the program at once, with SIGKILL, and waits for its end.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks the program to end, with SIGTERM, and waits. One that does not end
// within 10 s is killed, and that is an error.
func (p *Process) Stop() error {
	p.Signal(syscall.SIGTERM)
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-p.done:
		return nil
	case <-timer.C:
		p.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM and was killed", p.name, stopTimeout)
	}
}

// WaitReady calls probe until it returns nil. It fails when ctx or the program
// ends before.
func (p *Process) WaitReady(ctx context.Context, probe func(context.Context) error) error {
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s %w (%w); it printed:\n%s", p.name, ErrExited, p.err, p.Output())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w; it printed:\n%s", p.name, err, p.Output())
		case <-ticker.C:
		}
	}
}

// groupMembers are the living members of a process group, without its leader.
func groupMembers(group int) []int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	var members []int
	for _, file := range stats {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		// pid (comm) state ppid pgrp ...; comm may hold anything.
		fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if len(fields) > 2 && fields[2] == strconv.Itoa(group) && fields[0] != "Z" && pid != group {
			members = append(members, pid)
		}
	}
	return members
}

// output splits what a program prints into lines and keeps the newest.
type output struct {
	onLine func(string) bool

	mu      sync.Mutex
	partial []byte
	tail    []byte
}

func (o *output) Write(data []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := len(data)
	for {
		end := bytes.IndexByte(data, '\n')
		if end < 0 {
			break
		}
		o.line(append(o.partial, data[:end]...))
		o.partial = o.partial[:0]
		data = data[end+1:]
	}
	o.partial = append(o.partial, data...)
	return n, nil
}

func (o *output) line(line []byte) {
	if o.onLine != nil && !o.onLine(string(line)) {
		return
	}
	o.tail = append(append(o.tail, line...), '\n')
	if len(o.tail) > 2*tailSize {
		o.tail = append([]byte(nil), o.tail[len(o.tail)-tailSize:]...)
	}
}

func (o *output) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.partial) > 0 {
		o.line(o.partial)
		o.partial = nil
	}
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.tail) + string(o.partial)
}
