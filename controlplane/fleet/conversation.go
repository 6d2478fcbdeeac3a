// Package fleet is where edges' conversations with the control plane end: streams of
// gRPC, and links that carry several. Whoever speaks on them implements Conversation and
// needs no goroutine of its own for an edge.
package fleet

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Conversation is this replica's side of a conversation with one edge. Its methods are
// called one at a time, and none may wait for anything but a lock that is held briefly:
// what takes longer runs elsewhere and enters what it found by Line.Do.
type Conversation interface {
	// Take takes the next message of the edge. The edge should say nothing more for
	// delay. An error, a gRPC status, ends the conversation.
	Take(message proto.Message) (delay time.Duration, err error)
	// Next returns what to send now, zero for nothing: it is called again after
	// Line.Wake. An error ends the conversation.
	Next() (Outgoing, error)
	// Close is called last, once, however the conversation ended.
	Close()
}

// Outgoing is a message to an edge.
type Outgoing struct {
	// Message is a proto.Message, *Prepared or Welcome. Nil: there is none.
	Message any
	// Sent, unless nil, is called once the message does not matter any more: it was
	// encoded, or can't be sent. ok says that gRPC took it.
	Sent func(ok bool)
}

type welcome struct{}

// Welcome tells the edge that the conversation was accepted, before there is anything
// to say.
var Welcome any = welcome{}

// Service is one kind of conversation.
type Service struct {
	// Open begins a conversation with the edge that ctx is of. Its line may be used
	// at once. An error, a gRPC status, refuses.
	Open func(ctx context.Context, line *Line) (Conversation, error)
	// Message makes an empty message of an edge.
	Message func() proto.Message
	// Raw has Take get what an edge says as *Raw, to decode it itself.
	Raw bool
	// Lines are the conversations of this kind.
	Lines *Lines
}

// ErrStopping is the status with which conversations end when the replica does.
var ErrStopping = status.Error(codes.Unavailable, "this replica is stopping")

// Denied makes a gRPC status of an error that says who the caller is not.
func Denied(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.PermissionDenied, err.Error())
}

// Line is what a conversation goes over. Its methods are safe for concurrent use.
type Line struct {
	port   *port
	lines  *Lines // that it is one of
	number uint64 // on a link

	// The fields below belong to the port's worker.

	sending Outgoing // of which not all is sent
	rest    []byte   // of it

	woken atomic.Bool
	ended atomic.Pointer[ending]

	mu           sync.Mutex
	conversation Conversation // nil: not open yet, or closed
}

type ending struct{ err error }

// Wake has Next called, soon.
func (l *Line) Wake() {
	if !l.woken.Swap(true) {
		l.port.schedule()
	}
}

// End ends the conversation with a gRPC status, nil for OK. Only the first one counts.
// It does not wait.
func (l *Line) End(err error) {
	if l.ended.CompareAndSwap(nil, &ending{err}) {
		l.port.ended()
	}
}

// Err is the error that End was called with first, nil before that.
func (l *Line) Err() error {
	if e := l.ended.Load(); e != nil {
		return e.err
	}
	return nil
}

// Do calls f between the methods of the conversation, unless that is closed. Then the
// conversation is asked for what to send.
func (l *Line) Do(f func()) {
	l.mu.Lock()
	open := l.conversation != nil
	if open {
		f()
	}
	l.mu.Unlock()
	if open {
		l.Wake()
	}
}

// Detached is a line without an edge: what is said on it is lost. It is for tests.
func Detached() *Line {
	l := &Line{}
	l.port = &port{sender: newSender(), send: func(*Line, any) (bool, error) { return false, nil }, ended: func() {}, lines: []*Line{l}}
	return l
}

func (l *Line) open(c Conversation) {
	l.mu.Lock()
	l.conversation = c
	l.mu.Unlock()
	l.Wake()
}

func (l *Line) take(message proto.Message) (time.Duration, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conversation == nil || l.ended.Load() != nil {
		return 0, nil
	}
	return l.conversation.Take(message)
}

func (l *Line) next() (Outgoing, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conversation == nil || l.ended.Load() != nil {
		return Outgoing{}, nil
	}
	return l.conversation.Next()
}

func (l *Line) close() {
	l.mu.Lock()
	c := l.conversation
	l.conversation = nil
	l.mu.Unlock()
	if c != nil {
		c.Close()
	}
}

// Lines are all conversations of a kind. Create them with NewLines.
type Lines struct {
	sender *sender

	mu   sync.Mutex
	all  map[*Line]struct{}
	stop *ending // all that come later end with it
}

// NewLines makes an empty set.
func NewLines() *Lines { return &Lines{sender: newSender(), all: map[*Line]struct{}{}} }

// Wake wakes all.
func (ls *Lines) Wake() {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for l := range ls.all {
		l.Wake()
	}
}

// End ends all, and all that are still to come.
func (ls *Lines) End(err error) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	ls.stop = &ending{err}
	for l := range ls.all {
		l.End(err)
	}
}

func (ls *Lines) add(l *Line) error {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.stop != nil {
		return ls.stop.err
	}
	ls.all[l] = struct{}{}
	return nil
}

func (ls *Lines) remove(l *Line) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	delete(ls.all, l)
}
