package feed

import (
	"bytes"
	"context"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type syncStream = grpc.BidiStreamingServer[resealv1.SyncRequest, resealv1.SyncResponse]

// scripted is a control plane that runs a script per stream.
type scripted struct {
	resealv1.UnimplementedFeedServiceServer
	script func(stream syncStream, hello *resealv1.Hello) error

	mu     sync.Mutex
	hellos []*resealv1.Hello
	times  []time.Time
}

func (s *scripted) Sync(stream syncStream) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.hellos = append(s.hellos, first.GetHello())
	s.times = append(s.times, time.Now())
	script := s.script
	s.mu.Unlock()
	return script(stream, first.GetHello())
}

// follow makes script the one of the streams to come.
func (s *scripted) follow(script func(syncStream, *resealv1.Hello) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.script = script
}

func (s *scripted) seen() ([]*resealv1.Hello, []time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hellos, s.times
}

// memory is a state directory. It counts the writes of the last good configuration.
type memory struct {
	mu     sync.Mutex
	files  map[string][]byte
	writes int
	err    error
	slow   time.Duration
}

func (m *memory) Read(name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.files[name] == nil {
		return nil, fs.ErrNotExist
	}
	return m.files[name], nil
}

func (m *memory) Write(name string, data []byte) error {
	time.Sleep(m.slow)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	m.put(name, data)
	if name == lastGoodName {
		m.writes++
	}
	return nil
}

func (m *memory) Note(name string, data []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(name, data)
	return nil
}

func (m *memory) put(name string, data []byte) {
	if m.files == nil {
		m.files = map[string][]byte{}
	}
	m.files[name] = bytes.Clone(data)
}

func (m *memory) written() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

func (m *memory) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

// crashed is what the state directory holds when the process ends now.
func (m *memory) crashed() *memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &memory{files: maps.Clone(m.files)}
}

// whole makes an Apply that takes all of a candidate or nothing.
func whole(apply func(context.Context, *resealv1.Snapshot) []*resealv1.Violation) func(context.Context, Candidate) Outcome {
	return func(ctx context.Context, candidate Candidate) Outcome {
		violations := candidate.Unusable
		if len(violations) == 0 {
			violations = apply(ctx, candidate.Snapshot)
		}
		return Outcome{Violations: violations}
	}
}

type harness struct {
	*Feed
	server *scripted
	state  *memory
	stop   func()
}

// run starts a feed against a script.
func run(t *testing.T, state *memory, script func(syncStream, *resealv1.Hello) error, options ...func(*Config)) *harness {
	t.Helper()
	pipe := bufconn.Listen(1 << 20)
	h := &harness{server: &scripted{script: script}, state: state}
	server := grpc.NewServer()
	resealv1.RegisterFeedServiceServer(server, h.server)
	serving := make(chan error, 1)
	go func() { serving <- server.Serve(pipe) }()
	conn, err := grpc.NewClient("passthrough:///", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return pipe.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	config := Config{
		Edge: "e1", BootID: "b1", Version: "v1", Labels: map[string]string{"site": "a"},
		Client: resealv1.NewFeedServiceClient(conn), State: state,
		Apply:  whole(func(context.Context, *resealv1.Snapshot) []*resealv1.Violation { return nil }),
		Logger: slog.New(slog.DiscardHandler),
	}
	for _, option := range options {
		option(&config)
	}
	h.Feed = New(config)
	ctx, cancel := context.WithCancel(t.Context())
	running := make(chan error, 1)
	go func() { running <- h.Run(ctx) }()
	h.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-running; err != nil {
			t.Errorf("Run: %v", err)
		}
		conn.Close()
		server.Stop()
		if err := <-serving; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(h.stop)
	return h
}

func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// encoded is a pool as the server sends it.
func encoded(t interface{ Fatal(...any) }, name, address string) *resealv1.EncodedResource {
	data, err := proto.Marshal(&resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec: &resealv1.Resource_BackendPool{BackendPool: &resealv1.BackendPool{
			Endpoints: []*resealv1.Endpoint{{Address: address}},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &resealv1.EncodedResource{Kind: "BackendPool", Name: name, Resource: data}
}

// full is an update to resources.
func full(revision int64, resources ...*resealv1.EncodedResource) *resealv1.Update {
	return &resealv1.Update{ClusterId: "c", Revision: revision, Hash: resealv1.HashEncoded(resources), Upserts: resources}
}

// on makes an update build on a base; hash is of all that is then held.
func on(base, revision int64, hash []byte, upserts ...*resealv1.EncodedResource) *resealv1.Update {
	return &resealv1.Update{ClusterId: "c", BaseRevision: base, Revision: revision, Hash: hash, Upserts: upserts}
}

func updateMessage(update *resealv1.Update) *resealv1.SyncResponse {
	return &resealv1.SyncResponse{Message: &resealv1.SyncResponse_Update{Update: update}}
}

// send sends updates and returns the answers.
func send(stream syncStream, updates ...*resealv1.Update) ([]*resealv1.SyncRequest, error) {
	var answers []*resealv1.SyncRequest
	for _, update := range updates {
		if err := stream.Send(updateMessage(update)); err != nil {
			return nil, err
		}
		answer, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		answers = append(answers, answer)
	}
	return answers, nil
}

// hold keeps a stream until the edge ends it.
func hold(stream syncStream) error {
	<-stream.Context().Done()
	return stream.Context().Err()
}
