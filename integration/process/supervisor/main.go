// Command supervisor runs a daemon that may be replaced by another process of its own
// making, as systemd does: descendants whose parent has ended become its children. It
// passes signals on to the process that a file names, and ends when all have ended, with
// the worst of their exit statuses.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: supervisor PID-FILE PROGRAM ARGS…")
		os.Exit(2)
	}
	os.Exit(run(os.Args[1], os.Args[2], os.Args[3:]))
}

func run(pidFile, program string, args []string) int {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "supervisor:", err)
		return 2
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2)
	command := exec.Command(program, args...)
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	if err := command.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "supervisor:", err)
		return 2
	}
	go func() {
		for received := range signals {
			_ = syscall.Kill(daemon(pidFile, command.Process.Pid), received.(syscall.Signal)) // it may have ended
		}
	}()
	worst := 0
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil: // there is no child any more
			return worst
		case status.Signaled():
			fmt.Fprintf(os.Stderr, "supervisor: process %d was ended by %s\n", pid, status.Signal())
			worst = max(worst, 128+int(status.Signal()))
		default:
			worst = max(worst, status.ExitStatus())
		}
	}
}

// daemon is the process that serves: the one that the file names, or the first.
func daemon(pidFile string, first int) int {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return first
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return first
	}
	return pid
}
