package feed

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// budgets are the shares that a test wants, by edge and pool.
type budgets struct {
	mu     sync.Mutex
	shares map[string]uint32
	asked  map[string]uint32 // for which maxPerFleet
}

func (b *budgets) share(edge, pool string, of uint32) (uint32, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked[edge+" "+pool] = of
	share, ok := b.shares[edge+" "+pool]
	return share, ok
}

func (b *budgets) set(edge, pool string, share uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.shares[edge+" "+pool] = share
}

func limitedPool(name string, n uint32) *resealv1.Resource {
	made := pool(name, "10.0.0.1:443")
	made.GetBackendPool().Connections = &resealv1.Connections{MaxPerFleet: &n}
	return made
}

// listen collects what an edge is told, in short, and acks updates.
func listen(stream resealv1.FeedService_SyncClient) (heard func() string) {
	var mu sync.Mutex
	var all []string
	go func() {
		for {
			message, err := stream.Recv()
			if err != nil {
				return
			}
			var text string
			if shares := message.GetConnectionShares(); shares != nil {
				for _, pool := range shares.GetPools() {
					text += fmt.Sprintf("%s=%d ", pool.GetPool(), pool.GetConnections())
				}
			} else if update := message.GetUpdate(); update != nil {
				text = fmt.Sprint("revision ", update.GetRevision())
				_ = stream.Send(&resealv1.SyncRequest{Message: &resealv1.SyncRequest_Ack{Ack: &resealv1.Ack{Revision: update.GetRevision()}}})
			}
			mu.Lock()
			all = append(all, strings.TrimSpace(text))
			mu.Unlock()
		}
	}()
	return func() string {
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		now := strings.Join(all, ", ")
		all = nil
		return now
	}
}

// Shares come before the update that they are for, again when they change, and for
// nobody else.
func TestShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &budgets{shares: map[string]uint32{}, asked: map[string]uint32{}}
		s := newSource()
		site := map[string]string{"site": "x"}
		revision := s.apply(many(limitedPool("app", 10), limitedPool("other", 10), pool("free", "10.0.0.1:443"),
			listener("web", "app", nil), listener("free", "free", nil), listener("x", "other", site)))
		p := startPlane(t, s, func(c *Config) { c.Share = b.share })
		wants := func(who string, heard func() string, want string) {
			t.Helper()
			if got := heard(); got != want {
				t.Errorf("%s heard %q, want %q", who, got, want)
			}
		}

		b.set("e1", "app", 4)
		one := listen(p.hello("e1", &resealv1.Hello{Edge: "e1", BootId: "b1"}))
		two := listen(p.hello("e2", &resealv1.Hello{Edge: "e2", BootId: "b2", Labels: site}))
		wants("e1", one, fmt.Sprint("app=4, revision ", revision))
		wants("e2", two, fmt.Sprint("revision ", revision)) // nothing is known of it yet

		p.server.Reshare()
		wants("e1", one, "")
		b.set("e2", "app", 4)
		b.set("e2", "other", 9)
		b.set("e1", "other", 9) // which it has not
		p.server.Reshare()
		wants("e1", one, "")
		wants("e2", two, "app=4 other=9")
		b.set("e1", "app", 3)
		p.server.Reshare()
		wants("e1", one, "app=3")
		wants("e2", two, "")

		// A share that is not known any more stands.
		b.mu.Lock()
		delete(b.shares, "e1 app")
		b.mu.Unlock()
		p.server.Reshare()
		wants("e1", one, "")
		b.set("e1", "app", 3)

		// Another limit: its share is asked for, and what is said already is not said again.
		revision = s.apply(many(limitedPool("app", 20)))
		wants("e1", one, fmt.Sprint("revision ", revision))
		if of := b.asked["e1 app"]; of != 20 {
			t.Errorf("asked for the share of %d", of)
		}
		// Without a limit there is nothing to tell.
		revision = s.apply(many(pool("app", "10.0.0.1:443")))
		wants("e1", one, fmt.Sprint("revision ", revision))
		b.set("e1", "app", 1)
		p.server.Reshare()
		wants("e1", one, "")
		revision = s.apply(many(limitedPool("app", 2)))
		wants("e1", one, fmt.Sprint("app=1, revision ", revision))
	})
}

// While a change is on its way to the fleet each edge has its share of the limit that it
// is to serve.
func TestSharesGoByStages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &budgets{shares: map[string]uint32{"e1 app": 1, "e2 app": 1}, asked: map[string]uint32{}}
		s := newSource()
		before := s.apply(many(limitedPool("app", 10), listener("web", "app", nil)))
		p := startPlane(t, s, func(c *Config) { c.Share, c.Aimed = b.share, true })
		time.Sleep(time.Second)
		p.server.Aim(t.Context(), before, before, nil)
		one := listen(p.hello("e1", &resealv1.Hello{Edge: "e1", BootId: "b1"}))
		two := listen(p.hello("e2", &resealv1.Hello{Edge: "e2", BootId: "b2"}))
		one()
		two()
		after := s.apply(many(limitedPool("app", 2)))
		synctest.Wait()
		p.server.Aim(t.Context(), before, after, func(id string, _ map[string]string) bool { return id == "e1" })
		if got := one(); got != fmt.Sprint("revision ", after) {
			t.Errorf("e1 heard %q", got)
		}
		p.server.Reshare()
		synctest.Wait()
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.asked["e1 app"] != 2 || b.asked["e2 app"] != 10 {
			t.Errorf("asked for the shares of %v", b.asked)
		}
	})
}

// An edge of an earlier version knows nothing of shares, and is told them all the same:
// what it can't read it passes over.
func TestSharesAreAMessageOfTheirOwn(t *testing.T) {
	told := &resealv1.SyncResponse{Message: &resealv1.SyncResponse_ConnectionShares{ConnectionShares: &resealv1.ConnectionShares{
		Pools: []*resealv1.ConnectionShare{{Pool: "app", Connections: 300}},
	}}}
	data, err := proto.Marshal(told)
	if err != nil {
		t.Fatal(err)
	}
	if want := "R\n\n\b\n\x03app\x10\xac\x02"; string(data) != want {
		t.Errorf("on the wire %q, want %q", data, want)
	}
}
