package link

import (
	"context"
	"io"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// conversation is a stream of gRPC for whoever uses it, and a part of a link. It
// implements grpc.ClientStream; as there, one goroutine may send while another
// receives.
type conversation struct {
	session  *session
	number   uint64
	method   string // "" once it was said; of whoever sends
	ctx      context.Context
	stop     func() bool   // watching ctx
	accepted chan struct{} // closed when the control plane has answered, or it has ended
	news     chan struct{} // holds a token when there may be something to receive

	mu      sync.Mutex
	partial []byte   // the message that is not complete yet
	waiting [][]byte // messages
	size    int      // of all these, in bytes
	heard   bool     // accepted is closed
	err     error    // why it has ended, nil before
}

// take takes a piece. It does not wait: what may come is bounded by what the edge has
// yet to answer.
func (c *conversation) take(response *resealv1.ConnectResponse) {
	if end := response.GetEnd(); end != nil {
		c.end(reason(end))
		return
	}
	c.mu.Lock()
	c.hearLocked()
	if !response.GetAccepted() {
		c.size += len(response.GetData())
		c.partial = append(c.partial, response.GetData()...)
		if !response.GetMore() {
			c.waiting, c.partial = append(c.waiting, c.partial), nil
		}
	}
	tooMuch := c.size > MaxMessage
	c.mu.Unlock()
	if tooMuch {
		c.abandon()
		c.end(errTooLarge)
		return
	}
	c.wake()
}

func (c *conversation) hearLocked() {
	if !c.heard {
		c.heard = true
		close(c.accepted)
	}
}

func (c *conversation) wake() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// end notes that nothing comes any more, and why.
func (c *conversation) end(err error) {
	c.session.forget(c)
	c.stop()
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.hearLocked()
	c.mu.Unlock()
	c.wake()
}

// abandon tells the control plane that the edge has ended the conversation.
func (c *conversation) abandon() {
	c.session.forget(c)
	c.session.sending.Lock()
	_ = c.session.stream.Send(&resealv1.ConnectRequest{Conversation: c.number, End: true}) // the link ends if it can't
	c.session.sending.Unlock()
	if err := c.ctx.Err(); err != nil {
		c.end(status.FromContextError(err).Err())
	}
}

// Header waits until the control plane has answered.
func (c *conversation) Header() (metadata.MD, error) {
	select {
	case <-c.accepted:
	case <-c.ctx.Done():
		return nil, status.FromContextError(c.ctx.Err()).Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil && len(c.waiting) == 0 {
		return nil, nil // as gRPC does: RecvMsg says why
	}
	return metadata.MD{}, nil
}

// Trailer is empty.
func (c *conversation) Trailer() metadata.MD { return nil }

// CloseSend does nothing: an edge ends a conversation by its context.
func (c *conversation) CloseSend() error { return nil }

// Context is that of the conversation.
func (c *conversation) Context() context.Context { return c.ctx }

// SendMsg sends a proto.Message. The error is io.EOF when the conversation has ended;
// RecvMsg says why.
func (c *conversation) SendMsg(message any) error {
	c.mu.Lock()
	ended := c.err != nil
	c.mu.Unlock()
	if ended {
		return io.EOF
	}
	data, err := proto.Marshal(message.(proto.Message))
	if err != nil {
		return status.Errorf(codes.Internal, "encode: %v", err)
	}
	return c.session.send(c, data)
}

// RecvMsg waits for the next proto.Message.
func (c *conversation) RecvMsg(message any) error {
	for {
		data, err := c.next()
		if err != nil {
			return err
		}
		if data != nil {
			return decode(data, message)
		}
		select {
		case <-c.news:
		case <-c.ctx.Done():
			return status.FromContextError(c.ctx.Err()).Err()
		}
	}
}

func decode(data []byte, message any) error {
	if err := proto.Unmarshal(data, message.(proto.Message)); err != nil {
		return status.Errorf(codes.Internal, "decode: %v", err)
	}
	return nil
}

// next takes the oldest message, nil when there is none.
func (c *conversation) next() ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.waiting) == 0 {
		return nil, c.err
	}
	data := c.waiting[0]
	c.waiting[0] = nil
	c.waiting = c.waiting[1:]
	c.size -= len(data)
	if data == nil {
		data = []byte{} // an empty message
	}
	return data, nil
}
