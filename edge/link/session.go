package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxPiece bounds a piece of a message, in bytes: one TLS record takes it.
const maxPiece = writeBuffer - 64

// ErrLost is the error of conversations whose link has ended. Why is told once, by
// Config.Lost.
var ErrLost = errors.New("the link to the control plane is lost")

// session is one link: a stream, and the conversations on it.
type session struct {
	stream resealv1.LinkService_ConnectClient

	// sending is held for one piece, so that pieces of different messages take turns.
	sending sync.Mutex

	mu     sync.Mutex
	newest uint64
	open   map[uint64]*conversation
	ended  bool
}

// begin starts a conversation.
func (s *session) begin(ctx context.Context, method string) (*conversation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, ErrLost
	}
	s.newest++
	c := &conversation{
		session: s, number: s.newest, method: method,
		ctx: ctx, accepted: make(chan struct{}), news: make(chan struct{}, 1),
	}
	s.open[c.number] = c
	c.stop = context.AfterFunc(ctx, c.abandon)
	return c, nil
}

// receive takes what comes until the link ends, and returns why.
func (s *session) receive() error {
	for {
		response, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			err = errEnded
		}
		if err != nil {
			return err
		}
		if response.GetConversation() == 0 {
			return reason(response.GetEnd())
		}
		s.mu.Lock()
		c := s.open[response.GetConversation()]
		s.mu.Unlock()
		if c != nil {
			c.take(response)
		}
	}
}

// lose ends all conversations.
func (s *session) lose() {
	s.mu.Lock()
	s.ended = true
	open := s.open
	s.open = nil
	s.mu.Unlock()
	for _, c := range open {
		c.end(ErrLost)
	}
}

func (s *session) forget(c *conversation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c.number)
}

// send sends a message of c, in pieces.
func (s *session) send(c *conversation, data []byte) error {
	for first := true; first || len(data) > 0; first = false {
		piece := data[:min(len(data), maxPiece)]
		data = data[len(piece):]
		request := &resealv1.ConnectRequest{Conversation: c.number, Method: c.method, Data: piece, More: len(data) > 0}
		c.method = "" // it is known now
		s.sending.Lock()
		err := s.stream.Send(request)
		s.sending.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// reason is the error of an end, io.EOF when it ended well.
func reason(end *resealv1.ConnectEnd) error {
	if end.GetCode() == 0 {
		return io.EOF
	}
	s := status.New(codes.Code(end.GetCode()), end.GetMessage())
	if end.GetRetryAfter() != nil {
		if detailed, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: end.GetRetryAfter()}); err == nil {
			s = detailed
		}
	}
	return s.Err()
}

var errEnded = errors.New("the control plane ended the link")

var errTooLarge = status.Error(codes.ResourceExhausted, fmt.Sprintf("messages of more than %d bytes wait", MaxMessage))
