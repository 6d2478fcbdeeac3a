package feed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/controlplane/fleet"
	edgefeed "github.com/reseal/reseal/edge/feed"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const cluster = "c1"

var errForgotten = errors.New("not kept")

// source is a store in memory.
type source struct {
	mu      sync.Mutex
	history []*resealv1.Snapshot
	changed chan struct{}
	reads   map[int64]int // of history, by revision
	broken  bool          // At fails
	former  int64         // newest revision of the numbering before
}

func newSource() *source {
	return &source{
		history: []*resealv1.Snapshot{resealv1.NewSnapshot(cluster, 0, nil)},
		changed: make(chan struct{}),
		reads:   map[int64]int{},
	}
}

func (s *source) Snapshot() *resealv1.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.history[len(s.history)-1]
}

func (s *source) Next(ctx context.Context, after int64) (*resealv1.Snapshot, error) {
	for {
		s.mu.Lock()
		newest, changed, former := s.history[len(s.history)-1], s.changed, s.former
		s.mu.Unlock()
		if newest.Revision() > after || after > newest.Revision() && after <= former {
			return newest, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *source) At(_ context.Context, revision int64) (*resealv1.Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads[revision]++
	for _, snapshot := range s.history {
		if snapshot.Revision() == revision && !s.broken {
			return snapshot, nil
		}
	}
	return nil, errForgotten
}

// apply makes the next revision.
func (s *source) apply(upserts []*resealv1.Resource, deletes ...*resealv1.ResourceRef) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	newest := s.history[len(s.history)-1]
	revision := newest.Revision() + 1
	for _, resource := range upserts {
		resource.Metadata.Revision = revision
	}
	s.history = append(s.history, newest.With(revision, upserts, deletes))
	close(s.changed)
	s.changed = make(chan struct{})
	return revision
}

// restore goes back to an earlier revision, as from a backup: the revisions that
// follow have numbers that meant something else before.
func (s *source) restore(revision int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.former = s.history[len(s.history)-1].Revision()
	for i, snapshot := range s.history {
		if snapshot.Revision() == revision {
			s.history = s.history[:i+1]
			break
		}
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// The resources of the tests.

func pool(name, address string) *resealv1.Resource {
	return named(name, &resealv1.Resource{Spec: &resealv1.Resource_BackendPool{BackendPool: &resealv1.BackendPool{
		Endpoints: []*resealv1.Endpoint{{Address: address}},
	}}})
}

func listener(name, pool string, match map[string]string, certificates ...string) *resealv1.Resource {
	return named(name, &resealv1.Resource{Spec: &resealv1.Resource_Listener{Listener: &resealv1.Listener{
		Address: ":443", Pool: pool, Certificates: certificates,
		EdgeSelector: &resealv1.EdgeSelector{MatchLabels: match},
	}}})
}

func certificate(name, key string) *resealv1.Resource {
	return named(name, &resealv1.Resource{Spec: &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{
		CertificatePem: "chain of " + name, PrivateKeyPem: key,
	}}})
}

func keyring(name string, match map[string]string) *resealv1.Resource {
	return named(name, &resealv1.Resource{Spec: &resealv1.Resource_Keyring{Keyring: &resealv1.Keyring{
		RotationInterval: durationpb.New(time.Hour), EdgeSelector: &resealv1.EdgeSelector{MatchLabels: match},
	}}})
}

func route(name string, listeners []string, pools ...string) *resealv1.Resource {
	spec := &resealv1.Route{Listeners: listeners}
	for _, pool := range pools {
		spec.Pools = append(spec.Pools, &resealv1.WeightedPool{Name: pool})
	}
	return named(name, &resealv1.Resource{Spec: &resealv1.Resource_Route{Route: spec}})
}

func policy(name string) *resealv1.Resource {
	return named(name, &resealv1.Resource{Spec: &resealv1.Resource_TlsPolicy{TlsPolicy: &resealv1.TLSPolicy{Alpn: []string{name}}}})
}

func named(name string, resource *resealv1.Resource) *resealv1.Resource {
	resource.Metadata = &resealv1.Metadata{Name: name, Uid: "uid-" + name}
	return resource
}

func ref(kind, name string) *resealv1.ResourceRef {
	return &resealv1.ResourceRef{Kind: kind, Name: name}
}

func many(resources ...*resealv1.Resource) []*resealv1.Resource { return resources }

// plane is a control plane that is nothing but a feed.
type plane struct {
	t        *testing.T
	source   *source
	server   *Server
	registry *prometheus.Registry
	pipe     *bufconn.Listener
	grpc     *grpc.Server
	stop     func()
}

// edgeHeader stands for the certificate of the calling edge.
const edgeHeader = "test-edge"

func startPlane(t *testing.T, from *source, options ...func(*Config)) *plane {
	t.Helper()
	p := &plane{t: t, source: from, registry: prometheus.NewRegistry(), pipe: bufconn.Listen(1 << 20)}
	config := Config{
		Source:     from,
		Edge:       callingEdge,
		Unseal:     unseal,
		Logger:     testLogger(),
		Registerer: p.registry,
	}
	for _, option := range options {
		option(&config)
	}
	p.server = New(config)
	p.grpc = grpc.NewServer(grpc.ForceServerCodecV2(fleet.Codec{}))
	resealv1.RegisterFeedServiceServer(p.grpc, p.server)
	resealv1.RegisterFleetServiceServer(p.grpc, p.server)
	resealv1.RegisterPreviewServiceServer(p.grpc, p.server.Previewer())
	resealv1.RegisterObservationServiceServer(p.grpc, p.server.Observer())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- p.server.Run(ctx) }()
	go func() { ended <- p.grpc.Serve(p.pipe) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		p.grpc.GracefulStop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Errorf("the plane ended with %v", err)
			}
		}
	})
	t.Cleanup(p.stop)
	return p
}

func callingEdge(ctx context.Context) (string, map[string]string, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	ids := headers.Get(edgeHeader)
	if len(ids) == 0 {
		return "", nil, errors.New("no certificate")
	}
	return ids[0], nil, nil
}

// unseal stands for the decryption of private keys.
func unseal(resource *resealv1.Resource) (*resealv1.Resource, error) {
	sealed := resource.GetCertificate().GetPrivateKeyPem()
	switch {
	case sealed == "":
		return resource, nil
	case sealed == "damaged":
		return nil, errors.New("wrong key")
	}
	plain := certificate(resource.GetMetadata().GetName(), "clear "+sealed)
	plain.Metadata = resource.Metadata
	return plain, nil
}

func testLogger(to ...io.Writer) *slog.Logger {
	if os.Getenv("FEED_TEST_LOG") != "" {
		to = append(to, os.Stderr)
	}
	return slog.New(slog.NewTextHandler(io.MultiWriter(to...), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// dial connects as an edge.
func (p *plane) dial(id string) *grpc.ClientConn {
	p.t.Helper()
	authenticate := func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		return streamer(metadata.AppendToOutgoingContext(ctx, edgeHeader, id), desc, conn, method, opts...)
	}
	conn, err := grpc.NewClient("passthrough:///plane",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.pipe.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxUpdate)),
		grpc.WithStreamInterceptor(authenticate))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn
}

func (p *plane) edges() []*resealv1.Edge {
	p.t.Helper()
	response, err := p.server.ListEdges(p.t.Context(), &resealv1.ListEdgesRequest{})
	if err != nil {
		p.t.Fatal(err)
	}
	return response.GetEdges()
}

// edge returns a row of the table, empty when there is none.
func (p *plane) edge(id string) *resealv1.Edge {
	for _, edge := range p.edges() {
		if edge.GetId() == id {
			return edge
		}
	}
	return &resealv1.Edge{}
}

// updates are the updates sent so far, as "full delta empty".
func (p *plane) updates() string {
	count := func(kind string) int {
		return int(testutil.ToFloat64(p.server.metrics.updates.WithLabelValues(kind)))
	}
	return fmt.Sprint(count("full"), count("delta"), count("empty"))
}

func (p *plane) resourcesSent() int {
	sent := p.server.metrics.resources
	return int(testutil.ToFloat64(sent.WithLabelValues("full")) + testutil.ToFloat64(sent.WithLabelValues("delta")))
}

// disk is an edge's state directory.
type disk struct {
	mu     sync.Mutex
	files  map[string][]byte
	writes int
	err    error
}

func newDisk() *disk { return &disk{files: map[string][]byte{}} }

func (d *disk) Read(name string) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	data, ok := d.files[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return data, nil
}

func (d *disk) Write(name string, data []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return d.err
	}
	d.writes++
	d.files[name] = data
	return nil
}

func (d *disk) Note(name string, data []byte) error { return d.Write(name, data) }

// node is a running edge that is nothing but a feed.
type node struct {
	feed *edgefeed.Feed
	stop func()

	mu      sync.Mutex
	log     bytes.Buffer
	applied []*resealv1.Snapshot
	drained []string
	refuse  func(*resealv1.Snapshot) []*resealv1.Violation
	slow    time.Duration
}

func startNode(t *testing.T, client resealv1.FeedServiceClient, id string, labels map[string]string, state *disk, options ...func(*node)) *node {
	t.Helper()
	n := &node{}
	for _, option := range options {
		option(n)
	}
	n.feed = edgefeed.New(edgefeed.Config{
		Edge: id, BootID: "boot-" + id, Version: "v1", Labels: labels,
		Client: client, State: state, Logger: testLogger(&lockedWriter{n}),
		Apply: n.apply, Drain: n.drain,
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.feed.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("edge %s ended with %v", id, err)
		}
		if n.distrusted() {
			t.Errorf("edge %s got an update that did not fit:\n%s", id, n.log.String())
		}
	})
	t.Cleanup(n.stop)
	return n
}

// lockedWriter is a node's log.
type lockedWriter struct{ node *node }

func (w *lockedWriter) Write(line []byte) (int, error) {
	w.node.mu.Lock()
	defer w.node.mu.Unlock()
	return w.node.log.Write(line)
}

// distrusted tells whether an update ever did not fit. The feed heals that, so
// nothing else shows it.
func (n *node) distrusted() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return bytes.Contains(n.log.Bytes(), []byte("broke the protocol"))
}

func (n *node) apply(_ context.Context, candidate edgefeed.Candidate) edgefeed.Outcome {
	snapshot := candidate.Snapshot
	n.mu.Lock()
	refuse, slow := n.refuse, n.slow
	n.mu.Unlock()
	if slow > 0 {
		time.Sleep(slow)
	}
	if refuse != nil {
		if violations := refuse(snapshot); len(violations) > 0 {
			return edgefeed.Outcome{Violations: violations}
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.applied = append(n.applied, snapshot)
	return edgefeed.Outcome{}
}

func (n *node) drain(drain bool, timeout time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drained = append(n.drained, fmt.Sprint(drain, " ", timeout))
}

// newest is what the edge serves.
func (n *node) newest() *resealv1.Snapshot {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.applied) == 0 {
		return resealv1.NewSnapshot("", 0, nil)
	}
	return n.applied[len(n.applied)-1]
}

func (n *node) set(change func(*node)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change(n)
}

// keys are the resources of a snapshot as "Kind/name".
func keys(snapshot *resealv1.Snapshot) []string {
	var keys []string
	for _, resource := range snapshot.All() {
		keys = append(keys, resource.Ref().Key())
	}
	return keys
}

// chosen are the keys of the resources that labels select, sorted.
func chosen(snapshot *resealv1.Snapshot, labels map[string]string) []string {
	g := newGeneration(snapshot, nil, time.Time{})
	return slices.Sorted(maps.Keys(g.closure(g.choose(labels))))
}

// settle lets everything come to rest.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}
