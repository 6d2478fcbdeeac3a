package upgrade

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
)

// Successor is this process, in what it has to do with the one before.
type Successor struct {
	// Terms are what the predecessor said first.
	Terms Terms

	channel *channel

	mu    sync.Mutex
	parts []Part // received, and not taken yet
}

// Take says hello over conn, on behalf of a version, and receives what the
// predecessor offers. Errors: ErrRefused, ErrLost, ErrProtocol, and that of ctx. On
// error conn is closed.
func Take(ctx context.Context, conn *net.UnixConn, version string) (*Successor, error) {
	s := &Successor{channel: &channel{conn: conn}}
	done := s.channel.within(ctx, stepTime)
	defer done()
	err := s.channel.say(kindHello, hello{Oldest: oldest, Newest: newest, Version: version, PID: os.Getpid()})
	if err == nil {
		err = s.greeted()
	}
	if err == nil {
		err = s.await(kindOffered)
	}
	if err != nil {
		return nil, errors.Join(explain(ctx, err, "the running process does not answer"), s.Close())
	}
	return s, nil
}

func (s *Successor) greeted() error {
	m, err := s.channel.receive()
	if err != nil {
		return err
	}
	var why reason
	switch m.Kind {
	case kindWelcome:
		err = json.Unmarshal(m.Body, &s.Terms)
	case kindRefused:
		_ = json.Unmarshal(m.Body, &why) // says nothing then
		return fmt.Errorf("%w: %s", ErrRefused, why.Reason)
	default:
		return fmt.Errorf("%w: %q in place of welcome", ErrProtocol, m.Kind)
	}
	if err != nil || s.Terms.Protocol < oldest || s.Terms.Protocol > newest {
		return fmt.Errorf("%w: protocol %d was not offered", ErrProtocol, s.Terms.Protocol)
	}
	return nil
}

// await takes parts until the predecessor says k.
func (s *Successor) await(k kind) error {
	for {
		m, err := s.channel.receive()
		switch {
		case err != nil:
			return err
		case m.Kind == k:
			return nil
		case m.Kind != kindPart:
			return fmt.Errorf("%w: %q in place of %q", ErrProtocol, m.Kind, k)
		}
		s.keep(m)
	}
}

func (s *Successor) keep(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.parts = append(s.parts, Part{Name: m.Name, Key: m.Key, Data: m.data, File: m.file})
}

// Parts takes the parts of a name, in the order in which they came. What Parts
// returned is the caller's, with its files.
func (s *Successor) Parts(name string) []Part {
	s.mu.Lock()
	defer s.mu.Unlock()
	var taken, rest []Part
	for _, part := range s.parts {
		if part.Name == name {
			taken = append(taken, part)
		} else {
			rest = append(rest, part)
		}
	}
	s.parts = rest
	return taken
}

// Data takes the newest data of a name, nil if there is none.
func (s *Successor) Data(name string) []byte {
	parts := s.Parts(name)
	defer closeFiles(parts)
	if len(parts) == 0 {
		return nil
	}
	return parts[len(parts)-1].Data
}

// Ready says that this process can serve, and waits until it is to.
func (s *Successor) Ready(ctx context.Context) error {
	done := s.channel.within(ctx, stepTime)
	defer done()
	err := s.channel.say(kindReady, nil)
	if err == nil {
		err = s.await(kindGo)
	}
	return explain(ctx, err, "the running process does not let go")
}

// Fail says why this process can't serve.
func (s *Successor) Fail(err error) {
	done := s.channel.within(context.Background(), stepTime)
	defer done()
	_ = s.channel.say(kindFailed, reason{err.Error()}) // it ends in any case
}

// Serving says that this process serves, and returns when the place is its own. An
// error means that the predecessor has ended instead, or takes too long: the place is
// this process's all the same, since one that serves is never called back, but of an
// error of ctx.
func (s *Successor) Serving(ctx context.Context) error {
	done := s.channel.within(ctx, stepTime)
	defer done()
	err := s.channel.say(kindServing, nil)
	if err == nil {
		err = s.await(kindYours)
	}
	return explain(ctx, err, "the running process does not yield")
}

// Follow calls progress whenever the predecessor tells of it, with the parts of that
// moment among those that Parts returns, until it has ended or ctx has. ended says
// that it did so in order.
func (s *Successor) Follow(ctx context.Context, progress func(Progress)) (ended bool) {
	stop := context.AfterFunc(ctx, func() { _ = s.channel.conn.Close() })
	defer stop()
	for {
		m, err := s.channel.receive()
		if err != nil {
			return false
		}
		switch m.Kind {
		case kindPart:
			s.keep(m)
		case kindProgress:
			var p Progress
			if json.Unmarshal(m.Body, &p) == nil {
				progress(p)
			}
		case kindEnded:
			return true
		}
	}
}

// Close closes the channel and the files of parts that nobody has taken.
func (s *Successor) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeFiles(s.parts)
	s.parts = nil
	return s.channel.close()
}
