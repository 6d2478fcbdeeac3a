package fleet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxPiece bounds a piece of a message, in bytes.
	maxPiece = 64 << 10
	// maxMessage bounds a message of an edge, in bytes, as the server does those on
	// other streams.
	maxMessage = 16 << 20
	// maxConversations bounds those that are open on a link. An edge has one of each
	// kind, and for a moment one that takes its place.
	maxConversations = 16
)

// Links implements LinkService: it carries conversations of several services.
type Links struct {
	resealv1.UnimplementedLinkServiceServer

	services map[string]Service // by method
	lines    *Lines             // of the links themselves
}

// NewLinks makes Links that carry the services of these methods, such as
// "/reseal.v1.FeedService/Sync".
func NewLinks(services map[string]Service) *Links {
	return &Links{services: services, lines: NewLines()}
}

// Run ends all links when ctx does, and returns nil.
func (ls *Links) Run(ctx context.Context) error {
	<-ctx.Done()
	ls.lines.End(ErrStopping)
	return nil
}

// link is one link. Its goroutine is the one that reads.
type link struct {
	links  *Links
	ctx    context.Context
	stream resealv1.LinkService_ConnectServer
	port   *port
	open   map[uint64]*carried
}

// carried is a conversation on a link.
type carried struct {
	Line
	service Service
	whole   *bytes.Buffer // of the message that is not complete yet, nil: there is none
}

// Connect implements resealv1.LinkServiceServer.
func (ls *Links) Connect(stream resealv1.LinkService_ConnectServer) error {
	l := &link{links: ls, ctx: stream.Context(), stream: stream, open: map[uint64]*carried{}}
	l.port = &port{sender: ls.lines.sender, send: l.send, finish: l.tellEnd}
	l.port.ended = l.port.schedule
	own := &Line{port: l.port}
	if err := ls.lines.add(own); err != nil {
		return err
	}
	defer ls.lines.remove(own)
	l.port.add(own)
	defer l.close()
	for {
		var request incoming
		err := stream.RecvMsg(&request)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = l.take(&request)
		}
		request.free()
		if err != nil {
			return err
		}
	}
}

// close closes all conversations: the stream has ended.
func (l *link) close() {
	for _, c := range l.open {
		c.ended.CompareAndSwap(nil, &ending{l.ctx.Err()})
		c.finish()
	}
}

// take takes a piece. An error ends the link.
func (l *link) take(request *incoming) error {
	number := request.conversation
	c := l.open[number]
	switch {
	case c == nil && request.method == "":
		return nil // it has ended
	case c == nil:
		if number == 0 {
			return status.Error(codes.InvalidArgument, "conversation: 0 is the link itself")
		}
		if err := l.sweep(); err != nil {
			return err
		}
		if c = l.begin(number, request.method); c == nil {
			return nil
		}
	}
	switch {
	case request.end:
		delete(l.open, number)
		l.port.remove(&c.Line)
		c.ended.CompareAndSwap(nil, &ending{})
		c.finish()
	case c.ended.Load() != nil:
		delete(l.open, number)
	default:
		c.piece(request)
	}
	return nil
}

// begin opens a conversation. It is nil when that ended at once, which the edge is
// told.
func (l *link) begin(number uint64, method string) *carried {
	c := &carried{}
	c.port, c.number = l.port, number
	l.port.add(&c.Line)
	service, ok := l.links.services[method]
	if !ok {
		c.End(status.Errorf(codes.Unimplemented, "no link carries %s", Cut(method, MaxText)))
		return nil
	}
	c.service = service
	if err := service.begin(l.ctx, &c.Line); err != nil {
		c.End(err)
		return nil
	}
	l.open[number] = c
	return c
}

// sweep forgets conversations that this side has ended, and refuses too many.
func (l *link) sweep() error {
	for number, c := range l.open {
		if c.ended.Load() != nil {
			delete(l.open, number)
		}
	}
	if len(l.open) >= maxConversations {
		return status.Errorf(codes.ResourceExhausted, "more than %d conversations are open", maxConversations)
	}
	return nil
}

// piece takes a piece of a message.
func (c *carried) piece(request *incoming) {
	if c.length()+len(request.data) > maxMessage {
		c.End(status.Errorf(codes.ResourceExhausted, "a message has more than %d bytes", maxMessage))
		return
	}
	data := request.data
	if c.whole != nil || request.more {
		if c.whole == nil {
			c.whole = wholes.Get().(*bytes.Buffer)
		}
		c.whole.Write(data)
		data = c.whole.Bytes()
	}
	if request.more {
		return
	}
	c.message(data)
	c.drop()
}

// message takes a message, which is not kept.
func (c *carried) message(data []byte) {
	var message proto.Message
	if c.service.Raw {
		message = &Raw{Data: data}
	} else {
		message = c.service.Message()
		if err := proto.Unmarshal(data, message); err != nil {
			c.End(status.Error(codes.Internal, "a message can't be decoded"))
			return
		}
	}
	delay, err := c.take(message)
	switch {
	case err != nil:
		c.End(err)
	case delay > 0:
		// Others must not wait for this one.
		c.End(tooFast(delay))
	}
}

func tooFast(delay time.Duration) error {
	s := status.New(codes.ResourceExhausted, "the edge says too much")
	if detailed, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(delay)}); err == nil {
		s = detailed
	}
	return s.Err()
}

// tellEnd closes a conversation that this side has ended, and tells the edge why. It
// runs on the port's worker.
func (l *link) tellEnd(line *Line) {
	l.port.remove(line)
	line.finish()
	s := status.Convert(line.Err())
	end := &resealv1.ConnectEnd{Code: uint32(s.Code()), Message: s.Message()}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			end.RetryAfter = info.GetRetryDelay()
		}
	}
	_ = l.stream.SendMsg(&resealv1.ConnectResponse{Conversation: line.number, End: end})
}

// send sends the next piece of a message. more says that there are further ones.
func (l *link) send(line *Line, message any) (more bool, err error) {
	if message == Welcome {
		return false, l.stream.SendMsg(&resealv1.ConnectResponse{Conversation: line.number, Accepted: true})
	}
	if line.rest == nil {
		if line.rest, err = wire(message); err != nil {
			return false, status.Error(codes.Internal, "a message can't be encoded")
		}
	}
	piece := line.rest
	if more = len(piece) > maxPiece; more {
		piece, line.rest = piece[:maxPiece], piece[maxPiece:]
	} else {
		line.rest = nil
	}
	return more, l.stream.SendMsg(frame(line.number, piece, more))
}

// wire is the wire form of a message, never nil. It must not be changed.
func wire(message any) ([]byte, error) {
	if prepared, ok := message.(*Prepared); ok {
		return prepared.Wire, nil
	}
	data, err := proto.Marshal(message.(proto.Message))
	if data == nil {
		data = []byte{}
	}
	return data, err
}

// frame is a ConnectResponse whose data is not copied.
func frame(number uint64, data []byte, more bool) *pieces {
	head := protowire.AppendTag(nil, 1, protowire.VarintType)
	head = protowire.AppendVarint(head, number)
	if more {
		head = protowire.AppendTag(head, 3, protowire.VarintType)
		head = protowire.AppendVarint(head, 1)
	}
	head = protowire.AppendTag(head, 2, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(len(data)))
	return &pieces{head, data}
}
