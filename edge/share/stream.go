package share

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// lookInterval is how often this edge looks for what no signal announces: a
	// renewed certificate, sessions that became too old to be shared.
	lookInterval = 250 * time.Millisecond
	// holdInterval is the least time between two looks at what this edge holds.
	holdInterval = 100 * time.Millisecond
	// maxPeers bounds the other edges that are remembered, maxSeeds the requests
	// that wait.
	maxPeers = 1024
	maxSeeds = 1024
	// maxStock is how many tickets that are taken once an edge that asks for no
	// number gets.
	maxStock = 8
)

var (
	errEnded         = errors.New("the control plane ended the stream")
	errNoPools       = errors.New("no pool is shared any more")
	errNoCredentials = errors.New("the edge has no certificate yet")
)

type credentials struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	roots       *x509.CertPool
}

// meeting is one stream. Any error ends all of it.
type meeting struct {
	share  *Share
	stream grpc.BidiStreamingClient[resealv1.ExchangeRequest, resealv1.ExchangeResponse]
	seeds  chan *resealv1.ExchangeSeed

	mu    sync.Mutex
	keys  []credentials // the current ones, then those before
	peers map[string]*resealv1.ExchangeMember
	// joined are the pools of the last join.
	joined []string

	// Of the goroutine that sends.
	holding *resealv1.ExchangeHolding // as last told
	looked  time.Time                 // when it was made out
	again   *time.Timer               // when to look again
}

// exchange runs a stream to its end.
func (s *Share) exchange(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	x := &meeting{share: s, seeds: make(chan *resealv1.ExchangeSeed, maxSeeds), peers: map[string]*resealv1.ExchangeMember{}}
	if !x.renew() {
		return errNoCredentials
	}
	stream, err := s.cfg.Client.Exchange(ctx)
	if err != nil {
		return err
	}
	x.stream = stream
	group.Go(func() error { return exchange.Guard("shared sessions were taken", x.receive) })
	group.Go(func() error {
		err := exchange.Guard("sessions were shared", func() error { return x.talk(ctx) })
		if errors.Is(err, io.EOF) {
			return nil // why is what receive returns
		}
		return err
	})
	return group.Wait()
}

// renew adopts the current credentials and reports whether they are new.
func (x *meeting) renew() bool {
	certificate, key, roots, ok := x.share.cfg.Credentials()
	x.mu.Lock()
	defer x.mu.Unlock()
	if !ok || len(x.keys) > 0 && x.keys[0].certificate.Equal(certificate) && x.keys[0].roots == roots {
		return false
	}
	x.keys = append([]credentials{{certificate, key, roots}}, x.keys...)
	x.keys = x.keys[:min(len(x.keys), 2)]
	return true
}

func (x *meeting) credentials() []credentials {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.keys)
}

// receive always returns an error.
func (x *meeting) receive() error {
	for {
		message, err := x.stream.Recv()
		if errors.Is(err, io.EOF) {
			return errEnded
		}
		if err != nil {
			return err
		}
		x.take(message)
	}
}

func (x *meeting) take(message *resealv1.ExchangeResponse) {
	switch message := message.GetMessage().(type) {
	case *resealv1.ExchangeResponse_Member:
		x.mu.Lock()
		defer x.mu.Unlock()
		if _, known := x.peers[message.Member.GetEdge()]; known || len(x.peers) < maxPeers {
			x.peers[message.Member.GetEdge()] = message.Member
		}
	case *resealv1.ExchangeResponse_Gone:
		if message.Gone.GetRevoked() {
			x.share.cfg.Logger.Warn("an edge was revoked: its sessions are dropped", "edge", message.Gone.GetEdge())
			x.share.cfg.Sessions.Expel(message.Gone.GetEdge())
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		delete(x.peers, message.Gone.GetEdge())
	case *resealv1.ExchangeResponse_Seed:
		select {
		case x.seeds <- message.Seed:
		default: // the relay does not wait for long
		}
	case *resealv1.ExchangeResponse_Offer:
		if err := x.share.accept(message.Offer, x.credentials()); err != nil {
			x.share.refusals.Do(func() {
				x.share.cfg.Logger.Warn("a session from another edge is refused", "origin", message.Offer.GetOrigin(),
					"pool", message.Offer.GetPool(), "reason", err.Error())
			})
		}
	case *resealv1.ExchangeResponse_Seeded:
		x.mu.Lock()
		joined := x.joined
		x.mu.Unlock()
		x.share.seeded(joined)
	}
}

// talk says all that this edge has to say.
func (x *meeting) talk(ctx context.Context) error {
	changes, stop := x.share.cfg.Sessions.Watch()
	defer stop()
	ticker := time.NewTicker(lookInterval)
	defer ticker.Stop()
	// What came within holdInterval of the last look is looked at after it.
	x.again = time.NewTimer(time.Hour)
	defer x.again.Stop()
	if err := x.join(); err != nil {
		return err
	}
	for {
		var err error
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-x.share.changed:
			err = x.join()
		case seed := <-x.seeds:
			err = x.seed(seed)
		case <-changes:
			err = x.offerNew(time.Now())
		case <-x.again.C:
			err = x.tellHolding(x.share.poolList(), time.Now())
		case <-ticker.C:
			if x.renew() {
				err = x.join()
			}
			if err == nil {
				err = x.offerNew(time.Now())
			}
		}
		if err != nil {
			return err
		}
	}
}

func (x *meeting) join() error {
	select {
	case <-x.share.changed: // what it told of is in this join
	default:
	}
	pools := x.share.poolList()
	if len(pools) == 0 {
		return errNoPools
	}
	join := &resealv1.ExchangeJoin{
		Edge: x.share.cfg.Edge, BootId: x.share.cfg.BootID, Labels: x.share.cfg.Labels,
		Certificate: x.credentials()[0].certificate.Raw, Pools: poolNames(pools),
	}
	join.Holding = x.held(pools)
	x.holding, x.looked = join.Holding, time.Now()
	x.mu.Lock()
	x.joined = join.Pools
	x.mu.Unlock()
	return x.stream.Send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Join{Join: join}})
}

func (x *meeting) held(pools []Pool) *resealv1.ExchangeHolding {
	holding := &resealv1.ExchangeHolding{}
	for _, pool := range pools {
		some, spare, stock := x.share.cfg.Sessions.Holds(pool.Group)
		if some {
			holding.Pools = append(holding.Pools, pool.Name)
		}
		if spare {
			holding.Spare = append(holding.Spare, pool.Name)
		}
		if stock {
			holding.Stock = append(holding.Stock, pool.Name)
		}
	}
	return holding
}

// tellHolding says what this edge holds, when that has changed.
func (x *meeting) tellHolding(pools []Pool, now time.Time) error {
	if wait := holdInterval - now.Sub(x.looked); wait > 0 {
		x.again.Reset(wait)
		return nil
	}
	holding := x.held(pools)
	x.looked = now
	if proto.Equal(holding, x.holding) {
		return nil
	}
	x.holding = holding
	return x.stream.Send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Holding{
		Holding: holding,
	}})
}

// offerNew offers new sessions to the members of their pools.
func (x *meeting) offerNew(now time.Time) error {
	pools := x.share.poolList()
	if err := x.tellHolding(pools, now); err != nil {
		return err
	}
	for _, pool := range pools {
		if !x.share.cfg.Sessions.Fresh(pool.Group) {
			continue
		}
		if err := x.deal(pool, x.members(pool.Name), 0); err != nil {
			return err
		}
	}
	return nil
}

// members are the other members of a pool, in a random order: tickets that are
// taken once may not suffice for all.
func (x *meeting) members(pool string) []*resealv1.ExchangeMember {
	x.mu.Lock()
	defer x.mu.Unlock()
	var members []*resealv1.ExchangeMember
	for _, member := range x.peers {
		if slices.Contains(member.GetPools(), pool) {
			members = append(members, member)
		}
	}
	rand.Shuffle(len(members), func(i, j int) { members[i], members[j] = members[j], members[i] })
	return members
}

// seed answers a request for what this edge holds.
func (x *meeting) seed(seed *resealv1.ExchangeSeed) error {
	for _, name := range seed.GetPools() {
		pool, ok := x.share.pool(name)
		if !ok {
			continue
		}
		most := int(seed.GetMost())
		if most == 0 {
			most = maxStock
		}
		if err := x.deal(pool, []*resealv1.ExchangeMember{seed.GetMember()}, most); err != nil {
			return err
		}
	}
	return x.stream.Send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_SeedDone{
		SeedDone: &resealv1.ExchangeSeedDone{Request: seed.GetRequest()},
	}})
}

// deal offers sessions of a pool to members: new ones, or, with seed, all.
func (x *meeting) deal(pool Pool, members []*resealv1.ExchangeMember, seed int) error {
	members = slices.DeleteFunc(members, func(member *resealv1.ExchangeMember) bool {
		return member.GetEdge() == x.share.cfg.Edge || !x.trusted(member)
	})
	for identity, dealt := range x.share.cfg.Sessions.Deal(pool.Group, len(members), seed) {
		for i, data := range dealt {
			if data == nil {
				continue
			}
			err := x.offer(pool.Name, identity, members[i], data)
			clear(data)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// trusted reports whether a member is the edge that the control plane says.
func (x *meeting) trusted(member *resealv1.ExchangeMember) bool {
	own := x.credentials()[0]
	_, err := x.share.trust.verify(member.GetEdge(), member.GetCertificate(), own.certificate, own.roots)
	if err != nil {
		x.share.refusals.Do(func() {
			x.share.cfg.Logger.Warn("an edge gets no sessions", "edge", member.GetEdge(), "reason", err.Error())
		})
	}
	return err == nil
}

func (x *meeting) offer(pool string, identity exchange.Identity, to *resealv1.ExchangeMember, data []byte) error {
	own := x.credentials()[0]
	key, err := x.share.trust.verify(to.GetEdge(), to.GetCertificate(), own.certificate, own.roots)
	if err != nil {
		return nil // it has expired since trusted looked
	}
	offer := &resealv1.SessionOffer{
		Origin: x.share.cfg.Edge, Recipient: to.GetEdge(), RecipientBootId: to.GetBootId(), Pool: pool, Identity: string(identity),
	}
	if err := seal(offer, data, key, own.certificate, own.key); err != nil {
		return err
	}
	return x.stream.Send(&resealv1.ExchangeRequest{Message: &resealv1.ExchangeRequest_Offer{Offer: offer}})
}
