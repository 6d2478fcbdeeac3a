package keyring

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestRevokeOnTheFleet(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r, other := f.start("r1"), f.start("r2")
	r.waitFor("default", "1 active")
	a, b := r.connect("a"), other.connect("b")
	a.waitFor("default", "1 active")
	b.waitFor("default", "1 active")
	r.rotate("default")
	a.waitFor("default", "1 retired, 2 active")
	other.waitFor("default", "1 retired, 2 active")
	revoke := func(dryRun bool, numbers ...uint64) *resealv1.RevokeResponse {
		t.Helper()
		response, err := other.client.Revoke(t.Context(), &resealv1.RevokeRequest{Epochs: numbers, All: len(numbers) == 0, DryRun: dryRun})
		if err != nil {
			t.Fatal(err)
		}
		return response
	}
	dry := revoke(true, 2, 1, 2)
	if diff := cmp.Diff([]uint64{1, 2}, dry.GetEpochs()); diff != "" || dry.GetActive() != 3 || dry.GetTicketAge().AsDuration() <= 0 {
		t.Errorf("dry run: %v", dry)
	}
	if got := epochs(r.status("default")); got != "1 retired, 2 active" {
		t.Errorf("a dry run left %s", got)
	}
	if got := revoke(false, 1); got.GetActive() != 2 {
		t.Errorf("active is %d", got.GetActive())
	}
	a.waitFor("default", "2 active")
	b.waitFor("default", "2 active")
	if got := revoke(false, 2); got.GetActive() != 3 {
		t.Errorf("active is %d", got.GetActive())
	}
	a.waitFor("default", "3 active")
	b.waitFor("default", "3 active")
	if got := revoke(false); !cmp.Equal(got.GetEpochs(), []uint64{3}) || got.GetActive() != 4 {
		t.Errorf("all: %v", got)
	}
	a.waitFor("default", "4 active")
	b.waitFor("default", "4 active")
	if log := f.log.String(); !strings.Contains(log, "author=operator/oscar keyring=default epoch=2") {
		t.Errorf("the log does not say who: %s", log)
	}
	// A prepared epoch takes over from a revoked active one.
	b.hush()
	r.rotate("default")
	a.waitFor("default", "4 active, 5 prepared")
	if got := revoke(false, 4); got.GetActive() != 5 {
		t.Errorf("active is %d", got.GetActive())
	}
	a.waitFor("default", "5 active")
	eventually(t, "the edge that is silent is seen to hold what was revoked", func() bool {
		s := r.status("default")
		return cmp.Equal(s.GetLaggards(), []string{"b"}) && cmp.Equal(s.GetEdges()[1].GetEpochs(), []uint64{4})
	})
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	_, r, _ := settled(t, "a")
	r.rotate("")
	for name, test := range map[string]struct {
		call func() error
		want codes.Code
	}{
		"status of nothing": {func() error {
			_, err := r.client.Status(t.Context(), &resealv1.StatusRequest{Keyring: "x"})
			return err
		}, codes.NotFound},
		"rotate nothing": {func() error {
			_, err := r.client.Rotate(t.Context(), &resealv1.RotateRequest{Keyring: "x"})
			return err
		}, codes.NotFound},
		"rotate twice": {func() error { _, err := r.client.Rotate(t.Context(), &resealv1.RotateRequest{}); return err }, codes.FailedPrecondition},
		"revoke of nothing": {func() error {
			_, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{Keyring: "x", All: true})
			return err
		}, codes.NotFound},
		"revoke unknown": {func() error {
			_, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{Epochs: []uint64{1, 9}})
			return err
		}, codes.NotFound},
		"revoke without words": {func() error { _, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{}); return err }, codes.InvalidArgument},
		"see what that costs": {func() error {
			_, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{DryRun: true})
			return err
		}, codes.InvalidArgument},
		"revoke some and all": {func() error {
			_, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{Epochs: []uint64{1}, All: true})
			return err
		}, codes.InvalidArgument},
		"revoke far too many": {func() error {
			_, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{Epochs: make([]uint64, MaxEpochs+1)})
			return err
		}, codes.InvalidArgument},
		"long name": {func() error {
			_, err := r.client.Rotate(t.Context(), &resealv1.RotateRequest{Keyring: strings.Repeat("x", 1<<20)})
			return err
		}, codes.NotFound},
	} {
		if got := status.Code(test.call()); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
	if got := epochs(r.status("default")); got != "1 active, 2 prepared" {
		t.Errorf("refused calls left %s", got)
	}
}

// TestNothingIsSentBeforeItIsKnown: an edge must not take missing for erased.
func TestNothingIsSentBeforeItIsKnown(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	empty := newSource()
	empty.newest = resealv1.NewSnapshot("c", 0, nil) // not loaded yet
	f.source = empty
	r := f.start("r1")
	n := r.connect("a")
	time.Sleep(300 * time.Millisecond)
	if got := n.responses(); got != 0 {
		t.Errorf("%d responses", got)
	}
	if _, err := r.client.Status(t.Context(), &resealv1.StatusRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("status: %v", err)
	}
	if _, err := r.client.Rotate(t.Context(), &resealv1.RotateRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("rotate: %v", err)
	}
	empty.apply(many(steady()))
	n.waitFor("default", "1 active")
	// An edge that nothing selects is told so.
	empty.apply(many(steady("id", "b")))
	n.waitFor("default", "none")
}

// TestConfigurationThatLags: a replica that has not heard of a keyring must not
// take it for deleted.
func TestConfigurationThatLags(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	late := newSource(steady())
	late.newest = resealv1.NewSnapshot("c", 1, f.source.newest.All())
	lagging := f.start("lagging", func(c *Config) { c.Source = late })
	lagging.waitFor("default", "1 active")
	eventually(t, "it leads", func() bool { return lagging.server.state.leader() == "lagging" })
	f.source.apply(many(keyringOf("new", time.Hour, time.Hour)))
	r := f.start("r1")
	r.waitFor("default", "1 active")
	// The record comes from a command, since this replica does not lead.
	if _, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{Keyring: "new", All: true}); status.Code(err) != codes.FailedPrecondition {
		t.Fatal(err)
	}
	made, err := newRecord(f.source.newest.Get("Keyring", "new").GetMetadata().GetUid(), 2, 0).
		after(time.Now(), f.prefix+"keyring/new", startAnew, f.sealer.seal)
	if err != nil {
		t.Fatal(err)
	}
	value, _ := made.encode()
	if _, err := f.client.Put(t.Context(), f.prefix+"keyring/new", string(value)); err != nil {
		t.Fatal(err)
	}
	r.waitFor("new", "1 active")
	n := lagging.connect("a")
	time.Sleep(300 * time.Millisecond)
	if f.values("keyring/")["keyring/new"] == "" || n.responses() != 0 {
		t.Errorf("the record was erased, or %d responses sent", n.responses())
	}
	late.apply(many(f.source.newest.Get("Keyring", "new")))
	n.waitFor("new", "1 active")
	n.waitFor("default", "1 active")
}

func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	n := r.connect("a")
	n.waitFor("default", "1 active")
	if _, err := f.client.Put(t.Context(), f.prefix+"keyring/default", `{"format":1,"id":"x","last":"super-secret"}`); err != nil {
		t.Fatal(err)
	}
	if code := status.Code(n.reason()); code != codes.Unavailable {
		t.Errorf("the stream ended with %s", code)
	}
	if got := n.holds("default"); got != "1 active" {
		t.Errorf("the edge was told to hold %s", got)
	}
	eventually(t, "the status says so", func() bool { return strings.Contains(r.status("default").GetProblem(), "damaged") })
	for _, err := range []error{
		func() error { _, err := r.client.Rotate(t.Context(), &resealv1.RotateRequest{}); return err }(),
	} {
		if status.Code(err) != codes.DataLoss {
			t.Errorf("%v", err)
		}
	}
	if strings.Contains(f.log.String(), "super-secret") {
		t.Error("the log quotes the record")
	}
	if response, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{All: true}); err != nil || response.GetActive() != 1 {
		t.Fatalf("%v %v", response, err)
	}
	r.connect("a").waitFor("default", "1 active")
}

// TestWrongKey: another key-encryption key neither erases keys on edges nor stops
// an operator from starting anew.
func TestWrongKey(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	first := f.start("r1")
	first.waitFor("default", "1 active")
	first.stop()
	wrong := newSealer()
	r := f.start("r2", func(c *Config) { c.Seal, c.Unseal = wrong.seal, wrong.open })
	eventually(t, "the status says so", func() bool { return strings.Contains(r.status("default").GetProblem(), "can't be unsealed") })
	n := r.connect("a")
	if code := status.Code(n.reason()); code != codes.Unavailable || n.responses() != 0 {
		t.Errorf("%s, %d responses", code, n.responses())
	}
	if _, err := r.client.Revoke(t.Context(), &resealv1.RevokeRequest{All: true}); err != nil {
		t.Fatal(err)
	}
	r.connect("a").waitFor("default", "2 active")
}

func TestSealFails(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1", func(c *Config) {
		c.Seal = func([]byte, []byte) ([]byte, error) { return nil, errors.New("no key at hand") }
	})
	eventually(t, "the log says so", func() bool { return strings.Contains(f.log.String(), "no key at hand") })
	if got := f.values("keyring/"); len(got) > 0 {
		t.Errorf("etcd holds %v", got)
	}
	if s := r.status("default"); s == nil || len(s.GetEpochs()) > 0 {
		t.Errorf("status is %v", s)
	}
}

// say opens a stream, sends requests as they are and returns why the stream
// ended. When a Send returns io.EOF it has, and Recv says why.
func (r *replica) say(as string, requests ...*resealv1.HoldRequest) error {
	r.t.Helper()
	n := r.open(as)
	for _, request := range requests {
		if err := n.stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			r.t.Fatal(err)
		}
	}
	for {
		response, err := n.stream.Recv()
		if err != nil {
			return err
		}
		if err := n.stream.Send(&resealv1.HoldRequest{Serial: response.GetSerial() + 1}); err != nil && !errors.Is(err, io.EOF) {
			r.t.Fatal(err)
		}
	}
}

func TestBadSpeech(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady())
	r := f.start("r1")
	r.waitFor("default", "1 active")
	labels := map[string]string{}
	for i := range maxLabels + 1 {
		labels[fmt.Sprint(i)] = "x"
	}
	long := strings.Repeat("x", maxText+1)
	held := func(k *resealv1.HeldKeyring) *resealv1.HoldRequest {
		return &resealv1.HoldRequest{Edge: "e", Keyrings: []*resealv1.HeldKeyring{k}}
	}
	for name, test := range map[string]struct {
		say  []*resealv1.HoldRequest
		want codes.Code
	}{
		"another's id":        {[]*resealv1.HoldRequest{{Edge: "e2"}}, codes.PermissionDenied},
		"no id":               {[]*resealv1.HoldRequest{{}}, codes.PermissionDenied},
		"an ack first":        {[]*resealv1.HoldRequest{{Edge: "e", Serial: 1}}, codes.InvalidArgument},
		"two first":           {[]*resealv1.HoldRequest{{Edge: "e"}, {Edge: "e"}}, codes.InvalidArgument},
		"ack of the future":   {[]*resealv1.HoldRequest{{Edge: "e"}}, codes.InvalidArgument},
		"too many labels":     {[]*resealv1.HoldRequest{{Edge: "e", Labels: labels}}, codes.InvalidArgument},
		"long label":          {[]*resealv1.HoldRequest{{Edge: "e", Labels: map[string]string{"a": long}}}, codes.InvalidArgument},
		"long name":           {[]*resealv1.HoldRequest{held(&resealv1.HeldKeyring{Name: long})}, codes.InvalidArgument},
		"too many epochs":     {[]*resealv1.HoldRequest{held(&resealv1.HeldKeyring{Epochs: make([]uint64, 2*MaxEpochs+1)})}, codes.InvalidArgument},
		"epochs not in order": {[]*resealv1.HoldRequest{held(&resealv1.HeldKeyring{Epochs: []uint64{2, 1}})}, codes.InvalidArgument},
		"too many keyrings":   {[]*resealv1.HoldRequest{{Edge: "e", Keyrings: make([]*resealv1.HeldKeyring, maxKeyrings+1)}}, codes.InvalidArgument},
		"keyrings in an ack":  {[]*resealv1.HoldRequest{{Edge: "e"}, {Serial: 1}}, codes.InvalidArgument},
	} {
		if err := r.say("e", test.say...); status.Code(err) != test.want {
			t.Errorf("%s: ended with %v, want %s", name, err, test.want)
		}
	}
	if _, err := r.client.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		err  error
		want codes.Code
	}{
		{errors.New("who are you"), codes.PermissionDenied},
		{status.Error(codes.Unavailable, "trust is down"), codes.Unavailable},
	} {
		refusing := f.start("refusing", func(c *Config) {
			c.Edge = func(context.Context) (string, map[string]string, error) { return "", nil, test.err }
		})
		stream, err := refusing.client.Hold(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != test.want {
			t.Errorf("%v, want %s", err, test.want)
		}
		refusing.stop()
	}
}

// TestLabelsOfTheToken win over what the edge says.
func TestLabelsOfTheToken(t *testing.T) {
	t.Parallel()
	f := newFleet(t, steady("zone", "eu"))
	r := f.start("r1", func(c *Config) {
		c.Edge = func(ctx context.Context) (string, map[string]string, error) {
			id, _, err := callingEdge(ctx)
			return id, map[string]string{"zone": "us"}, err
		}
	})
	r.waitFor("default", "1 active")
	ctx := metadata.AppendToOutgoingContext(t.Context(), edgeHeader, "a")
	stream, err := r.client.Hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&resealv1.HoldRequest{Edge: "a", Labels: map[string]string{"zone": "eu"}}); err != nil {
		t.Fatal(err)
	}
	response, err := stream.Recv()
	if err != nil || len(response.GetKeyrings()) != 0 {
		t.Errorf("%v %v", response, err)
	}
}

// TestAcks: an ack counts for what was sent, and can be said again.
func TestAcks(t *testing.T) {
	t.Parallel()
	_, r, n := settled(t, "a")
	claim := func(serial, encrypts uint64, numbers ...uint64) {
		t.Helper()
		request := &resealv1.HoldRequest{Serial: serial, Keyrings: []*resealv1.HeldKeyring{
			{Name: "default", Epochs: numbers, Active: encrypts}, {Name: "unknown", Epochs: numbers},
		}}
		if err := n.stream.Send(request); err != nil {
			t.Fatal(err)
		}
	}
	r.covers("[] 0")
	claim(1, 7, 1, 2, 3, 7)
	r.covers("[1] 0")
	claim(1, 1, 1)
	r.covers("[1] 1")
	claim(1, 0, 1)
	r.covers("[1] 0")
	r.rotate("default")
	n.waitFor("default", "1 active, 2 prepared")
	claim(1, 1, 1) // crossed the response
	claim(2, 1, 1) // it can't hold the new one
	r.covers("[1] 1")
	if got := epochs(r.status("default")); got != "1 active, 2 prepared" {
		t.Errorf("now %s", got)
	}
	claim(2, 1, 1, 2)
	n.waitFor("default", "1 retired, 2 active")
}
