package fleet

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	edgelink "github.com/reseal/reseal/edge/link"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// echo is a service whose conversations say what they hear. Some words are orders.
type echo struct {
	lines *Lines

	mu     sync.Mutex
	opened []*echoing
	closed int
}

type echoing struct {
	echo *echo
	line *Line

	mu    sync.Mutex
	words []string
}

func (e *echo) service() Service {
	return Service{Lines: e.lines, Message: func() proto.Message { return &resealv1.HoldRequest{} }, Open: func(_ context.Context, line *Line) (Conversation, error) {
		c := &echoing{echo: e, line: line}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.opened = append(e.opened, c)
		return c, nil
	}}
}

func (c *echoing) Take(message proto.Message) (time.Duration, error) {
	switch word := message.(*resealv1.HoldRequest).GetEdge(); word {
	case "refuse":
		return 0, resealv1.ErrTooManyEdges
	case "chatter":
		return time.Minute, nil
	default:
		c.say(word)
	}
	return 0, nil
}

func (c *echoing) say(word string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.words = append(c.words, word)
	c.line.Wake()
}

func (c *echoing) Next() (Outgoing, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.words) == 0 {
		return Outgoing{}, nil
	}
	word := c.words[0]
	c.words = c.words[1:]
	if word == "welcome" {
		return Outgoing{Message: Welcome}, nil
	}
	return Outgoing{Message: said(word)}, nil
}

func said(word string) *resealv1.HoldResponse {
	return &resealv1.HoldResponse{Keyrings: []*resealv1.KeyringSecrets{{Name: word}}}
}

func (c *echoing) Close() {
	c.echo.mu.Lock()
	defer c.echo.mu.Unlock()
	c.echo.closed++
}

func (e *echo) count() (opened, closed int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.opened), e.closed
}

// Hold implements resealv1.KeyringServiceServer.
func (e *echo) Hold(stream resealv1.KeyringService_HoldServer) error {
	return e.service().Serve(stream)
}

type plain struct {
	resealv1.UnimplementedKeyringServiceServer
	*echo
}

func (p plain) Hold(stream resealv1.KeyringService_HoldServer) error { return p.echo.Hold(stream) }

// world is a control plane that echoes, and an edge.
type world struct {
	t      *testing.T
	echo   *echo
	stop   func() // of the control plane's conversations
	client resealv1.KeyringServiceClient
	conn   *grpc.ClientConn

	mu     sync.Mutex
	losses []error
}

func newWorld(t *testing.T, carries bool) *world {
	t.Helper()
	w := &world{t: t, echo: &echo{lines: NewLines()}}
	pipe := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.ForceServerCodecV2(Codec{}))
	resealv1.RegisterKeyringServiceServer(server, plain{echo: w.echo})
	links := NewLinks(map[string]Service{resealv1.KeyringService_Hold_FullMethodName: w.echo.service()})
	if carries {
		resealv1.RegisterLinkServiceServer(server, links)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = links.Run(ctx) })
	running.Go(func() { _ = server.Serve(pipe) })
	w.stop = cancel
	var err error
	w.conn, err = grpc.NewClient("passthrough:///plane", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(edgelink.MaxMessage)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	edge := edgelink.New(w.conn, func(err error, _ time.Duration) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.losses = append(w.losses, err)
	}, resealv1.KeyringService_Hold_FullMethodName, resealv1.FeedService_Sync_FullMethodName)
	edgeCtx, stopEdge := context.WithCancel(context.Background())
	running.Go(func() { _ = edge.Run(edgeCtx) })
	w.client = resealv1.NewKeyringServiceClient(edge)
	t.Cleanup(func() {
		stopEdge()
		_ = w.conn.Close()
		cancel()
		server.Stop()
		running.Wait()
	})
	return w
}

// talk is a conversation of the edge.
type talk struct {
	t *testing.T
	resealv1.KeyringService_HoldClient
	cancel context.CancelFunc
}

func (w *world) talk() *talk {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.t.Cleanup(cancel)
	timer := time.AfterFunc(patience, cancel)
	w.t.Cleanup(func() { timer.Stop() })
	stream, err := w.client.Hold(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return &talk{w.t, stream, cancel}
}

func (k *talk) say(word string) {
	k.t.Helper()
	if err := k.Send(&resealv1.HoldRequest{Edge: word}); err != nil {
		k.t.Fatal(err)
	}
}

func (k *talk) hears(want string) {
	k.t.Helper()
	response, err := k.Recv()
	if err != nil || response.GetKeyrings()[0].GetName() != want {
		k.t.Fatalf("heard %d bytes, %v; want %.20s", proto.Size(response), err, want)
	}
}

func (k *talk) ends() error {
	for {
		if _, err := k.Recv(); err != nil {
			return err
		}
	}
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long: %s", what)
		}
	}
}

// A conversation is the same on a link as on a stream of its own, even with a control
// plane that knows no links.
func TestConversations(t *testing.T) {
	for name, carries := range map[string]bool{"on a link": true, "on streams": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, carries)
			open := func() *talk {
				k := w.talk()
				// Once it is known that there are no links Send fails, and Recv says why.
				_ = k.Send(&resealv1.HoldRequest{Edge: "welcome"})
				_ = k.Send(&resealv1.HoldRequest{Edge: "a"})
				if response, err := k.Recv(); err == nil && response.GetKeyrings()[0].GetName() == "a" {
					return k
				} else if !errors.Is(err, edgelink.ErrLost) {
					t.Fatal(response, err)
				}
				k = w.talk() // it is known now that there are no links
				k.say("welcome")
				if header, err := k.Header(); header == nil || err != nil {
					t.Errorf("it is not welcome: %v, %v", header, err)
				}
				k.say("a")
				k.hears("a")
				return k
			}
			one, other := open(), open()
			other.say("x")
			one.say("b")
			one.say("c")
			one.hears("b")
			one.hears("c")
			other.hears("x")
			long := strings.Repeat("long", 1<<18)
			one.say(long)
			one.hears(long)
			// One that ends leaves the others alone, whoever ends it.
			other.say("refuse")
			err := other.ends()
			details := status.Convert(err).Details()
			if status.Code(err) != codes.ResourceExhausted || len(details) != 1 || details[0].(*errdetails.RetryInfo).GetRetryDelay().AsDuration() <= 0 {
				t.Errorf("a refused one ends with %v, %v", err, details)
			}
			third := open()
			third.cancel()
			if err := third.ends(); status.Code(err) != codes.Canceled {
				t.Errorf("a cancelled one ends with %v", err)
			}
			eventually(t, "two are closed", func() bool { _, closed := w.echo.count(); return closed == 2 })
			one.say("d")
			one.hears("d")
			w.echo.mu.Lock()
			last := w.echo.opened[0]
			w.echo.mu.Unlock()
			last.line.End(Superseded("e"))
			if err := one.ends(); status.Code(err) != codes.Aborted {
				t.Errorf("a superseded one ends with %v", err)
			}
			if err := one.Send(&resealv1.HoldRequest{}); err != io.EOF {
				t.Errorf("on one that has ended Send returns %v", err)
			}
			w.echo.lines.End(ErrStopping)
			late := w.talk()
			late.say("a")
			if err := late.ends(); status.Code(err) != codes.Unavailable {
				t.Errorf("at the end one ends with %v", err)
			}
		})
	}
}

// TestLargeMessagesDelayNoOthers: what is said on one conversation while a large
// message of another is under way comes before its end.
func TestLargeMessagesDelayNoOthers(t *testing.T) {
	w := newWorld(t, true)
	bulk, small := w.talk(), w.talk()
	bulk.say("a")
	bulk.hears("a")
	small.say("a")
	small.hears("a")
	w.echo.mu.Lock()
	large, quick := w.echo.opened[0], w.echo.opened[1]
	w.echo.mu.Unlock()
	// 32 MiB don't fit into the flow control of the stream.
	large.say(strings.Repeat("x", 32<<20))
	quick.say("b")
	small.hears("b")
	bulk.hears(strings.Repeat("x", 32<<20))
}

// TestLinkIsLost: all conversations end, and the next go over the next link. When the
// replica stops, the edge is told.
func TestLinkIsLost(t *testing.T) {
	w := newWorld(t, true)
	k := w.talk()
	k.say("a")
	k.hears("a")
	w.stop()
	if err := k.ends(); !errors.Is(err, edgelink.ErrLost) {
		t.Errorf("it ends with %v", err)
	}
	eventually(t, "the edge tries again and is refused", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, err := range w.losses {
			if status.Code(err) != codes.Unavailable {
				t.Errorf("the link ended with %v", err)
			}
		}
		return len(w.losses) > 1
	})
	if opened, closed := w.echo.count(); opened != closed {
		t.Errorf("%d conversations are closed of %d", closed, opened)
	}
}

// TestStrangeLinks: what breaks the protocol ends a conversation or a link, and opens
// nothing without end.
func TestStrangeLinks(t *testing.T) {
	w := newWorld(t, true)
	const hold = resealv1.KeyringService_Hold_FullMethodName
	hello, _ := proto.Marshal(&resealv1.HoldRequest{Edge: "a"})
	chatter, _ := proto.Marshal(&resealv1.HoldRequest{Edge: "chatter"})
	for name, test := range map[string]struct {
		say  []*resealv1.ConnectRequest
		link codes.Code // with which the link ends; OK: it does not
		one  codes.Code // with which conversation 1 does
	}{
		"the link itself":      {say: []*resealv1.ConnectRequest{{Method: hold, Data: hello}}, link: codes.InvalidArgument},
		"another service":      {say: []*resealv1.ConnectRequest{{Conversation: 1, Method: resealv1.AdminService_Apply_FullMethodName}}, one: codes.Unimplemented},
		"junk":                 {say: []*resealv1.ConnectRequest{{Conversation: 1, Method: hold, Data: []byte{0xff}}}, one: codes.Internal},
		"too fast":             {say: []*resealv1.ConnectRequest{{Conversation: 1, Method: hold, Data: chatter}}, one: codes.ResourceExhausted},
		"a message that grows": {say: append([]*resealv1.ConnectRequest{{Conversation: 1, Method: hold, More: true}}, pieces1MiB(17)...), one: codes.ResourceExhausted},
		"many":                 {say: manyConversations(maxConversations+1, hold, hello), link: codes.ResourceExhausted},
		"what has ended":       {say: []*resealv1.ConnectRequest{{Conversation: 7, Data: hello}, {Conversation: 8, End: true}, {Conversation: 1, Method: "x"}}, one: codes.Unimplemented},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			stream, err := resealv1.NewLinkServiceClient(w.conn).Connect(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, request := range test.say {
				if err := stream.Send(request); err != nil && err != io.EOF {
					t.Fatal(err)
				}
			}
			for {
				response, err := stream.Recv()
				if err != nil {
					if status.Code(err) != test.link {
						t.Errorf("the link ended with %v", err)
					}
					return
				}
				if end := response.GetEnd(); end != nil && response.GetConversation() == 1 {
					if codes.Code(end.GetCode()) != test.one {
						t.Errorf("the conversation ended with %v", end)
					}
					return
				}
			}
		})
	}
	eventually(t, "all are closed", func() bool { opened, closed := w.echo.count(); return opened == closed })
	w.echo.lines.mu.Lock()
	defer w.echo.lines.mu.Unlock()
	if n := len(w.echo.lines.all); n > 0 {
		t.Errorf("%d are left", n)
	}
}

func pieces1MiB(n int) (all []*resealv1.ConnectRequest) {
	for range n {
		all = append(all, &resealv1.ConnectRequest{Conversation: 1, Data: make([]byte, 1<<20), More: true})
	}
	return all
}

func manyConversations(n int, method string, data []byte) (all []*resealv1.ConnectRequest) {
	for i := range n {
		all = append(all, &resealv1.ConnectRequest{Conversation: uint64(i + 1), Method: method, Data: data})
	}
	return all
}

// TestSlowEdgesHoldUpNobody: with more edges that don't read than there are workers,
// others are sent to all the same.
func TestSlowEdgesHoldUpNobody(t *testing.T) {
	s := newSender()
	release := make(chan struct{})
	made := func(send func(*Line, any) (bool, error)) *echoing {
		c := &echoing{line: &Line{}}
		c.line.port = &port{sender: s, send: send, ended: func() {}, lines: []*Line{c.line}}
		c.line.conversation = c
		return c
	}
	for range 3 * s.limit {
		made(func(*Line, any) (bool, error) { <-release; return false, nil }).say("stuck")
	}
	heard := make(chan struct{})
	made(func(*Line, any) (bool, error) { close(heard); return false, nil }).say("quick")
	select {
	case <-heard:
	case <-time.After(patience):
		t.Error("an edge waits for others")
	}
	close(release)
	eventually(t, "the workers end", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.workers == 0 && !s.watched
	})
}
