package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/reseal/reseal/cmd/daemon"
	"github.com/reseal/reseal/edge"
	"github.com/reseal/reseal/edge/upgrade"
)

// inheritance is what a process was started with: by one whose place it takes, by
// systemd, or by nobody.
type inheritance struct {
	predecessor *upgrade.Successor // nil: none
	sockets     *upgrade.Sockets
	admin       []upgrade.Part
}

// inherit takes what this process was started with.
func inherit(ctx context.Context) (*inheritance, error) {
	opened, err := daemon.Inherited()
	if err != nil {
		return nil, err
	}
	var parts []upgrade.Part
	for _, file := range opened {
		parts = append(parts, upgrade.Part{Name: upgrade.PartSocket, Key: file.Name(), File: file})
	}
	given := &inheritance{}
	conn, err := upgrade.Parent()
	if err != nil {
		return nil, err
	}
	if conn != nil {
		if given.predecessor, err = upgrade.Take(ctx, conn, version); err != nil {
			return nil, err
		}
		parts = append(parts, given.predecessor.Parts(upgrade.PartListener)...)
		parts = append(parts, given.predecessor.Parts(upgrade.PartSocket)...)
		given.admin = given.predecessor.Parts(upgrade.PartAdmin)
	}
	given.sockets, err = upgrade.NewSockets(parts...)
	return given, err
}

// page is the inherited socket of the admin page, nil if there is none for its address.
func (i *inheritance) page(address string) (found *os.File) {
	for _, part := range i.admin {
		if part.Key == address && found == nil {
			found = part.File
		} else if part.File != nil {
			_ = part.File.Close() // nobody wants it
		}
	}
	return found
}

// succession starts new processes of this program, at SIGUSR2, and gives them this
// one's place.
type succession struct {
	node    *edge.Edge
	page    *daemon.Page
	program upgrade.Program
	leave   func() // ends the admin page
	logger  *slog.Logger
	signals chan os.Signal
	given   atomic.Bool // another process has this one's place
}

func newSuccession(args []string, stdout, stderr io.Writer, logger *slog.Logger) (*succession, error) {
	path, err := upgrade.Executable()
	if err != nil {
		return nil, fmt.Errorf("this program's file: %w", err)
	}
	s := &succession{
		program: upgrade.Program{Path: path, Args: args, Stdout: stdout, Stderr: stderr},
		logger:  logger, signals: make(chan os.Signal, 1),
	}
	signal.Notify(s.signals, syscall.SIGUSR2)
	return s, nil
}

// run waits for signals until ctx ends.
func (s *succession) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.signals:
			s.upgrade(ctx)
		}
	}
}

// errFirst is why the first process of a container stays.
var errFirst = errors.New("this is process 1, with which its container ends: start a new container beside it (README, \"Upgrades\")")

func (s *succession) upgrade(ctx context.Context) {
	s.logger.Info("upgrade: starting the new process", "path", s.program.Path)
	s.notify(daemon.Reloading())
	pid, err := s.handOver(ctx)
	if err != nil {
		s.logger.Error("upgrade failed; this process goes on as before", "path", s.program.Path, "error", err)
		s.notify(daemon.Ready, "STATUS=The last upgrade failed, see the log.")
		return
	}
	s.logger.Info("upgrade: the new process serves, this one drains", "new_pid", pid)
}

func (s *succession) handOver(ctx context.Context) (pid int, err error) {
	if os.Getpid() == 1 {
		return 0, errFirst
	}
	var parts []upgrade.Part
	file, err := s.page.File()
	if err != nil {
		return 0, err
	}
	if file != nil {
		defer file.Close()
		parts = append(parts, upgrade.Part{Name: upgrade.PartAdmin, Key: s.page.Address, File: file})
	}
	child, err := s.program.Start()
	if err != nil {
		return 0, err
	}
	err = s.node.HandOver(ctx, child.Conn, parts, func() {
		s.given.Store(true)
		s.leave()
		s.notify(daemon.Successor(child.PID()))
	})
	if err != nil {
		if ended := child.End(); ended != nil {
			err = fmt.Errorf("%w; the new process ended with: %w", err, ended)
		}
		return 0, err
	}
	return child.PID(), nil
}

// stopping says that the daemon ends, which it does not if another process goes on.
func (s *succession) stopping() {
	if !s.given.Load() {
		s.notify(daemon.Stopping)
	}
}

func (s *succession) notify(assignments ...string) {
	if err := daemon.Notify(assignments...); err != nil {
		s.logger.Warn("systemd is not told", "error", err)
	}
}

// pidFile is a file with the id of the process that serves.
type pidFile string

func (f pidFile) write(logger *slog.Logger) {
	if f == "" {
		return
	}
	if err := os.WriteFile(string(f), []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
		logger.Error("--pid-file can't be written", "error", err)
	}
}

// remove removes the file, unless it is another process's by now.
func (f pidFile) remove() {
	if f == "" {
		return
	}
	text, err := os.ReadFile(string(f))
	if err == nil && strings.TrimSpace(string(text)) == strconv.Itoa(os.Getpid()) {
		_ = os.Remove(string(f)) // nobody can be told any more
	}
}
