package sessions

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/reseal/reseal/controlplane/fleet"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a relay that edges connect to. An edge with the label zone is allowed
// the pools of that zone, one without those of zone "".
type world struct {
	t        testing.TB
	relay    *Server
	listener *bufconn.Listener
	stop     func()

	mu       sync.Mutex
	zones    map[string][]string
	revision int64
	asked    int // how often for pools
}

func newWorld(t testing.TB, roots *x509.CertPool) *world {
	w := &world{t: t, listener: bufconn.Listen(1 << 20), zones: map[string][]string{"": {"p", "q"}}}
	config := Config{
		Edge: func(ctx context.Context) (string, map[string]string, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			switch id := md.Get("edge"); {
			case len(id) != 1:
				return "", nil, errors.New("who is it?")
			case id[0] == "fixed":
				return "fixed", map[string]string{"zone": "fixed"}, nil
			case id[0] == "late":
				return "", nil, status.Error(codes.Unavailable, "the store does not answer")
			default:
				return id[0], nil, nil
			}
		},
		Pools: func(labels map[string]string) []string {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.asked++
			return w.zones[labels["zone"]]
		},
		Revision: func() int64 {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.revision
		},
	}
	if roots != nil {
		config.Roots = func() *x509.CertPool { return roots }
	}
	w.relay = New(config)
	server := grpc.NewServer()
	resealv1.RegisterSessionServiceServer(server, w.relay)
	ctx, cancel := context.WithCancel(context.Background())
	var group errgroup.Group
	group.Go(func() error { return w.relay.Run(ctx) })
	group.Go(func() error { return server.Serve(w.listener) })
	w.stop = sync.OnceFunc(func() {
		cancel()
		server.GracefulStop() // streams end since Run has ended
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(w.stop)
	return w
}

func (w *world) allow(zone string, pools ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.zones[zone] = pools
	w.revision++
}

// edge is one stream.
type edge struct {
	t      testing.TB
	id     string
	stream grpc.BidiStreamingClient[resealv1.ExchangeRequest, resealv1.ExchangeResponse]
	got    chan *resealv1.ExchangeResponse
	err    error // after got is closed
	cancel context.CancelFunc
}

func (w *world) connect(id string) *edge {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:relay", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.listener.DialContext(ctx) }))
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if id != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "edge", id)
	}
	stream, err := resealv1.NewSessionServiceClient(conn).Exchange(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	e := &edge{t: w.t, id: id, stream: stream, got: make(chan *resealv1.ExchangeResponse, 100), cancel: cancel}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(e.got)
		for {
			message, err := stream.Recv()
			if err != nil {
				e.err = err
				return
			}
			e.got <- message
		}
	}()
	w.t.Cleanup(func() { cancel(); <-done; conn.Close() })
	return e
}

// certificateOf is a certificate for an edge, signed by itself.
func certificateOf(t testing.TB, id string, edits ...func(*x509.Certificate)) []byte {
	t.Helper()
	curve := elliptic.P256()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "reseal", Path: "/edge/" + id}},
	}
	for _, edit := range edits {
		edit(template)
	}
	if template.Subject.CommonName == "P-384" {
		curve = elliptic.P384()
	}
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func joinOf(t testing.TB, id string, pools ...string) *resealv1.ExchangeJoin {
	return &resealv1.ExchangeJoin{Edge: id, BootId: "boot-" + id, Certificate: certificateOf(t, id), Pools: pools}
}

func (e *edge) join(join *resealv1.ExchangeJoin) *edge {
	e.t.Helper()
	e.send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Join{Join: join}})
	return e
}

// send says a message. On a stream that the relay has ended it does nothing: why
// it ended is for want.
func (e *edge) send(message *resealv1.ExchangeRequest) {
	e.t.Helper()
	if err := e.stream.Send(message); err != nil && !errors.Is(err, io.EOF) {
		e.t.Fatal(err)
	}
}

func (e *edge) hold(spare bool, pools ...string) *edge {
	holding := &resealv1.ExchangeHolding{Pools: pools}
	if spare {
		holding.Spare = pools
	}
	e.send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Holding{Holding: holding}})
	return e
}

func (e *edge) offer(to, boot, pool string) {
	e.send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Offer{Offer: &resealv1.SessionOffer{
		Origin: e.id, Recipient: to, RecipientBootId: boot, Pool: pool, Identity: "g|a", Ciphertext: []byte("sealed"),
	}}})
}

// next is the next message in short.
func (e *edge) next() string {
	e.t.Helper()
	select {
	case message, ok := <-e.got:
		if !ok {
			return status.Code(e.err).String()
		}
		return short(message)
	case <-time.After(10 * time.Second):
		e.t.Fatalf("%s hears nothing", e.id)
		return ""
	}
}

func short(message *resealv1.ExchangeResponse) string {
	switch message := message.GetMessage().(type) {
	case *resealv1.ExchangeResponse_Member:
		return "member " + message.Member.GetEdge() + " " + strings.Join(message.Member.GetPools(), ",")
	case *resealv1.ExchangeResponse_Gone:
		return fmt.Sprintf("gone %s %t", message.Gone.GetEdge(), message.Gone.GetRevoked())
	case *resealv1.ExchangeResponse_Seed:
		return "seed " + message.Seed.GetMember().GetEdge() + " " + strings.Join(message.Seed.GetPools(), ",")
	case *resealv1.ExchangeResponse_Offer:
		return "offer " + message.Offer.GetOrigin() + " " + message.Offer.GetPool()
	case *resealv1.ExchangeResponse_Seeded:
		return "seeded"
	}
	return "?"
}

func (e *edge) want(messages ...string) {
	e.t.Helper()
	for _, want := range messages {
		if got := e.next(); got != want {
			e.t.Fatalf("%s got %q, want %q", e.id, got, want)
		}
	}
}

// wantAll wants messages in any order.
func (e *edge) wantAll(messages ...string) {
	e.t.Helper()
	for len(messages) > 0 {
		got := e.next()
		i := slices.Index(messages, got)
		if i < 0 {
			e.t.Fatalf("%s got %q, want one of %q", e.id, got, messages)
		}
		messages = slices.Delete(messages, i, i+1)
	}
}

// seed takes the next message, which is an ExchangeSeed.
func (e *edge) seed() *resealv1.ExchangeSeed {
	e.t.Helper()
	message, ok := <-e.got
	if !ok || message.GetSeed() == nil {
		e.t.Fatalf("%s was not asked: %v", e.id, message)
	}
	return message.GetSeed()
}

func (e *edge) seedRequest() uint64 { return e.seed().GetRequest() }

func (e *edge) done(request uint64) {
	e.send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_SeedDone{SeedDone: &resealv1.ExchangeSeedDone{Request: request}}})
}

func TestMembersHearOfEachOther(t *testing.T) {
	w := newWorld(t, nil)
	a := w.connect("a").join(joinOf(t, "a", "p", "q", "unknown"))
	a.want("seeded")
	b := w.connect("b").join(joinOf(t, "b", "q"))
	b.want("member a q", "seeded")
	a.want("member b q")
	b.join(joinOf(t, "b", "q", "p"))
	b.want("member a p,q", "seeded")
	a.want("member b p,q")
	other := w.connect("other").join(joinOf(t, "other", "unknown"))
	other.want("seeded") // and of nobody
	a.offer("b", "boot-b", "p")
	b.want("offer a p")
	b.join(joinOf(t, "b"))
	b.want("gone a false", "seeded")
	a.want("gone b false")
	b.join(joinOf(t, "b", "p"))
	a.want("member b p")
	b.cancel()
	a.want("gone b false")
	other.join(joinOf(t, "other", "p"))
	a.want("member other p") // nothing came from other before
}

func TestOffersThatAreDropped(t *testing.T) {
	w := newWorld(t, nil)
	w.allow("left", "p")
	a := w.connect("a").join(joinOf(t, "a", "p", "q"))
	a.want("seeded")
	inLeft := joinOf(t, "b", "p", "q")
	inLeft.Labels = map[string]string{"zone": "left"}
	b := w.connect("b").join(inLeft)
	b.want("member a p", "seeded")
	fixedJoin := joinOf(t, "fixed", "p")
	fixedJoin.Labels = map[string]string{"zone": ""} // its join token says otherwise
	fixed := w.connect("fixed").join(fixedJoin)
	fixed.want("seeded")
	a.want("member b p")
	a.offer("b", "boot-b", "q")         // b is not entitled to it
	a.offer("b", "before", "p")         // b's earlier start
	a.offer("nobody", "boot", "p")      // not there
	a.offer("a", "boot-a", "p")         // itself
	a.offer("fixed", "boot-fixed", "p") // not of the pool
	fixed.offer("a", "boot-fixed", "p") // likewise
	a.offer("b", "boot-b", "p")
	b.want("offer a p")
	// The configuration changes.
	w.allow("left")
	w.relay.entitleAll()
	b.want("gone a false")
	a.want("gone b false")
	a.offer("b", "boot-b", "p")
	w.allow("left", "q")
	w.relay.entitleAll()
	b.want("member a q")
}

func TestSeeding(t *testing.T) {
	w := newWorld(t, nil)
	var holders []*edge
	for i := range 4 {
		e := w.connect(fmt.Sprintf("h%d", i)).join(joinOf(t, fmt.Sprintf("h%d", i), "p"))
		for range i {
			e.next()
		}
		e.want("seeded")
		for _, other := range holders {
			other.next()
		}
		holders = append(holders, e)
	}
	nothing := w.connect("n").join(joinOf(t, "n", "p"))
	for range holders {
		nothing.next()
	}
	nothing.want("seeded") // nobody holds anything
	nothing.cancel()
	for _, e := range holders {
		e.want("member n p", "gone n false")
	}
	holders[0].hold(false, "p")
	holders[1].hold(true, "p")
	holders[2].hold(true, "p")
	w.until(func() bool { return len(w.relay.members["h2"].holding) == 1 && len(w.relay.members["h1"].holding) == 1 })

	cold := w.connect("cold").join(joinOf(t, "cold", "p", "q"))
	for range holders {
		cold.next()
	}
	for _, e := range holders {
		e.want("member cold p")
	}
	first, second := holders[1].seedRequest(), holders[2].seedRequest() // those that have some to spare
	holders[2].done(first)                                              // not its own
	holders[1].offer("cold", "boot-cold", "p")
	holders[1].done(first)
	cold.want("offer h1 p")
	holders[2].offer("cold", "boot-cold", "p")
	holders[2].done(second)
	cold.want("offer h2 p", "seeded")

	// A member that leaves is not waited for, nor one that does not answer.
	cold.join(joinOf(t, "cold", "q"))
	cold.wantAll("gone h0 false", "gone h1 false", "gone h2 false", "gone h3 false", "seeded")
}

// Tickets that are taken once lie about in ones and twos: a new edge gets them
// from more members than it would otherwise take to ask.
func TestStockOfManyMembers(t *testing.T) {
	w := newWorld(t, nil)
	var holders []*edge
	for i := range 3 {
		id := fmt.Sprintf("h%d", i)
		join := joinOf(t, id, "p")
		join.Holding = &resealv1.ExchangeHolding{Pools: []string{"p"}, Spare: []string{"p"}, Stock: []string{"p"}}
		holders = append(holders, w.connect(id).join(join))
		w.until(func() bool { return w.relay.members[id] != nil })
	}
	cold := w.connect("cold").join(joinOf(t, "cold", "p"))
	for _, e := range holders {
		for e.next() != "member cold p" {
		}
		seed := e.seed()
		if seed.GetMost() != maxStock/3 {
			t.Errorf("%s is asked for %d", e.id, seed.GetMost())
		}
		e.done(seed.GetRequest())
	}
	cold.wantAll("member h0 p", "member h1 p", "member h2 p", "seeded")
}

func (w *world) until(ok func() bool) {
	w.t.Helper()
	for range 1000 {
		w.relay.mu.Lock()
		now := ok()
		w.relay.mu.Unlock()
		if now {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	w.t.Fatal("it never happened")
}

func TestSilentSeedersAreNotWaitedFor(t *testing.T) {
	w := newWorld(t, nil)
	silent := joinOf(t, "silent", "p")
	silent.Holding = &resealv1.ExchangeHolding{Pools: []string{"p"}}
	a := w.connect("silent").join(silent)
	a.want("seeded")
	b := w.connect("b").join(joinOf(t, "b", "p"))
	b.want("member silent p")
	a.want("member b p", "seed b p")
	b.want("seeded") // after 800 ms
	c := w.connect("c").join(joinOf(t, "c", "p"))
	a.want("member c p", "seed c p")
	a.cancel()
	c.wantAll("member silent p", "member b p", "gone silent false", "seeded")
	w.until(func() bool { return len(w.relay.members["c"].awaiting) == 0 })
}

func TestNewerStreamEndsTheOlder(t *testing.T) {
	w := newWorld(t, nil)
	old := w.connect("a").join(joinOf(t, "a", "p"))
	old.want("seeded")
	b := w.connect("b").join(joinOf(t, "b", "p"))
	b.want("member a p", "seeded")
	old.want("member b p")
	renewed := w.connect("a").join(joinOf(t, "a", "p"))
	old.want("Aborted")
	renewed.want("member b p", "seeded")
	b.want("gone a false", "member a p")
	w.stop()
	b.want("Unavailable")
}

func TestRevoke(t *testing.T) {
	w := newWorld(t, nil)
	a := w.connect("a").join(joinOf(t, "a", "p"))
	a.want("seeded")
	b := w.connect("b").join(joinOf(t, "b", "p"))
	b.want("member a p", "seeded")
	other := w.connect("other").join(joinOf(t, "other"))
	other.want("seeded")
	a.want("member b p")
	w.relay.Revoke("a")
	a.want("PermissionDenied")
	b.want("gone a false", "gone a true")
	other.want("gone a true") // it may have got them when it shared the pool
	late := w.connect("late-comer").join(joinOf(t, "late-comer"))
	late.want("gone a true", "seeded")
}

func TestRefusals(t *testing.T) {
	w := newWorld(t, nil)
	long := strings.Repeat("x", maxName+1)
	many := slices.Repeat([]string{"p"}, maxPools+1)
	good := func(edit func(*resealv1.ExchangeJoin)) *resealv1.ExchangeRequest {
		join := joinOf(t, "a", "p")
		edit(join)
		return &resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Join{Join: join}}
	}
	offer := func(edit func(*resealv1.SessionOffer)) *resealv1.ExchangeRequest {
		o := &resealv1.SessionOffer{Origin: "a", Recipient: "b", Pool: "p", Identity: "g|a"}
		edit(o)
		return &resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Offer{Offer: o}}
	}
	certificate := func(id string, edit func(*x509.Certificate)) *resealv1.ExchangeRequest {
		return good(func(j *resealv1.ExchangeJoin) { j.Certificate = certificateOf(t, id, edit) })
	}
	joined := good(func(*resealv1.ExchangeJoin) {})
	for name, test := range map[string]struct {
		messages []*resealv1.ExchangeRequest
		want     codes.Code
	}{
		"no join first":       {[]*resealv1.ExchangeRequest{offer(func(*resealv1.SessionOffer) {})}, codes.InvalidArgument},
		"another edge":        {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Edge = "b" })}, codes.PermissionDenied},
		"no boot id":          {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.BootId = "" })}, codes.InvalidArgument},
		"many pools":          {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Pools = many })}, codes.InvalidArgument},
		"long pool":           {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Pools = []string{long} })}, codes.InvalidArgument},
		"long label":          {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Labels = map[string]string{"a": long} })}, codes.InvalidArgument},
		"steering label":      {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Labels = map[string]string{"a": "\x1b[2J"} })}, codes.InvalidArgument},
		"steering boot id":    {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.BootId = "\u202e" })}, codes.InvalidArgument},
		"holds too much":      {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Holding = &resealv1.ExchangeHolding{Spare: many} })}, codes.InvalidArgument},
		"huge certificate":    {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Certificate = make([]byte, maxCertificate+1) })}, codes.InvalidArgument},
		"no certificate":      {[]*resealv1.ExchangeRequest{good(func(j *resealv1.ExchangeJoin) { j.Certificate = nil })}, codes.PermissionDenied},
		"another's":           {[]*resealv1.ExchangeRequest{certificate("b", func(*x509.Certificate) {})}, codes.PermissionDenied},
		"an operator's":       {[]*resealv1.ExchangeRequest{certificate("a", func(c *x509.Certificate) { c.URIs[0].Path = "/operator/a" })}, codes.PermissionDenied},
		"expired":             {[]*resealv1.ExchangeRequest{certificate("a", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })}, codes.PermissionDenied},
		"other curve":         {[]*resealv1.ExchangeRequest{certificate("a", func(c *x509.Certificate) { c.Subject.CommonName = "P-384" })}, codes.PermissionDenied},
		"empty":               {[]*resealv1.ExchangeRequest{joined, {}}, codes.InvalidArgument},
		"offers for another":  {[]*resealv1.ExchangeRequest{joined, offer(func(o *resealv1.SessionOffer) { o.Origin = "b" })}, codes.PermissionDenied},
		"long identity":       {[]*resealv1.ExchangeRequest{joined, offer(func(o *resealv1.SessionOffer) { o.Identity = strings.Repeat("x", maxIdentity+1) })}, codes.InvalidArgument},
		"large ciphertext":    {[]*resealv1.ExchangeRequest{joined, offer(func(o *resealv1.SessionOffer) { o.Ciphertext = make([]byte, maxCiphertext+1) })}, codes.InvalidArgument},
		"large signature":     {[]*resealv1.ExchangeRequest{joined, offer(func(o *resealv1.SessionOffer) { o.Signature = make([]byte, maxSignature+1) })}, codes.InvalidArgument},
		"joins as another":    {[]*resealv1.ExchangeRequest{joined, good(func(j *resealv1.ExchangeJoin) { j.Edge = "b" })}, codes.PermissionDenied},
		"too much held later": {[]*resealv1.ExchangeRequest{joined, {Message: &resealv1.ExchangeRequest_Holding{Holding: &resealv1.ExchangeHolding{Pools: many}}}}, codes.InvalidArgument},
	} {
		e := w.connect("a")
		for _, message := range test.messages {
			e.send(message)
		}
		got := e.next()
		if got == "seeded" {
			got = e.next()
		}
		if got != test.want.String() {
			t.Errorf("%s: %s, want %v", name, got, test.want)
		}
	}
	w.connect("").want("PermissionDenied")
	w.connect("late").want("Unavailable")
	strict := newWorld(t, x509.NewCertPool())
	strict.connect("a").join(joinOf(t, "a")).want("PermissionDenied")
	w.until(func() bool { return len(w.relay.members) == 0 && w.relay.streams == 0 && w.relay.queued == 0 })
}

// A member that does not read holds up nobody, and what waits for it is bounded.
func TestSlowMember(t *testing.T) {
	w := newWorld(t, nil)
	a, slow := newMember("a", fleet.Detached()), newMember("slow", fleet.Detached())
	for _, m := range []*member{a, slow} {
		w.relay.join(m, nil, joinOf(t, m.id, "p"), true)
	}
	offer := &resealv1.SessionOffer{Origin: "a", Recipient: "slow", RecipientBootId: "boot-slow", Pool: "p", Ciphertext: make([]byte, maxCiphertext)}
	for range 1000 {
		w.relay.pass(a, offer)
	}
	if slow.underWay > maxUnderWay || slow.underWay < maxUnderWay/2 || w.relay.queued != slow.underWay {
		t.Errorf("%d bytes under way, %d in all", slow.underWay, w.relay.queued)
	}
	for w.relay.next(slow) != nil {
	}
	if slow.underWay != 0 || w.relay.queued != 0 {
		t.Errorf("%d bytes left, %d in all", slow.underWay, w.relay.queued)
	}
	for i := range maxMessages + 1 {
		slow.push(gone(fmt.Sprint(i), false))
	}
	if status.Code(slow.line.Err()) != codes.ResourceExhausted {
		t.Errorf("it goes on: %v", slow.line.Err())
	}
}

// A relay that is full says when to come back.
func TestFullRelay(t *testing.T) {
	s := New(Config{})
	s.streams = maxMembers
	if err := s.open(); !errors.Is(err, resealv1.ErrTooManyEdges) || len(status.Convert(err).Details()) != 1 {
		t.Errorf("an edge too many gets %v", err)
	}
}
