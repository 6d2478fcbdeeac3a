package fleet

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// Serve carries one conversation on a stream of its own, until one of the two ends.
func (s Service) Serve(stream grpc.ServerStream) error {
	ctx := stream.Context()
	over := make(chan struct{})
	l := &Line{}
	l.port = &port{
		sender: s.Lines.sender,
		send:   func(_ *Line, message any) (bool, error) { return false, sendOn(stream, message) },
		ended:  sync.OnceFunc(func() { close(over) }),
		lines:  []*Line{l},
	}
	if err := s.begin(ctx, l); err != nil {
		return err
	}
	defer l.finish()
	// It ends with the stream, which gRPC ends when this function returns, as does
	// whoever sends. Neither may hold up the end: one waits for the edge, the other for
	// the edge's flow control.
	go func() { l.End(s.receive(ctx, stream, l)) }()
	<-over
	return l.ended.Load().err
}

// begin opens a conversation on l.
func (s Service) begin(ctx context.Context, l *Line) error {
	l.lines = s.Lines
	if err := s.Lines.add(l); err != nil {
		return err
	}
	c, err := s.Open(ctx, l)
	if err != nil {
		s.Lines.remove(l)
		return err
	}
	l.open(c)
	return nil
}

// finish closes it.
func (l *Line) finish() {
	if l.lines != nil {
		l.lines.remove(l)
	}
	l.close()
}

func sendOn(stream grpc.ServerStream, message any) error {
	if message == Welcome {
		return stream.SendHeader(nil)
	}
	return stream.SendMsg(message)
}

func (s Service) receive(ctx context.Context, stream grpc.ServerStream, l *Line) error {
	for {
		message := s.Message()
		if s.Raw {
			message = &Raw{Message: message}
		}
		err := stream.RecvMsg(message)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		delay, err := l.take(message)
		if err != nil {
			return err
		}
		if err := pause(ctx, delay); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}
