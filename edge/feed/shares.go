package feed

import (
	"errors"
	"io/fs"

	"google.golang.org/protobuf/proto"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// sharesName keeps the edge's shares of connections.maxPerFleet, for a start without a
// control plane.
const sharesName = "connection-shares"

// RecallShares brings the shares that were told last, maybe to an earlier process, to
// Config.Shares. It is called before anything is applied.
func (f *Feed) RecallShares() {
	data, err := f.config.State.Read(sharesName)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	kept := &resealv1.ConnectionShares{}
	if err == nil {
		err = proto.Unmarshal(data, kept)
	}
	if err != nil {
		f.config.Logger.Error("the kept shares of connections can't be used; pools with connections.maxPerFleet have one connection until the control plane tells", "error", err)
		return
	}
	f.share(kept)
}

// shareAnew goes by shares that were told just now, and keeps them. Each stream begins
// with some, which are known as a rule.
func (f *Feed) shareAnew(told *resealv1.ConnectionShares) {
	if proto.Equal(told, f.shares) {
		return
	}
	f.share(told)
	data, err := proto.Marshal(told)
	if err == nil {
		err = f.config.State.Write(sharesName, data)
	}
	if err != nil {
		f.config.Logger.Error("shares of connections are not kept for the next start", "error", err)
	}
}

func (f *Feed) share(told *resealv1.ConnectionShares) {
	f.shares = told
	if f.config.Shares == nil {
		return
	}
	shares := make(map[string]int, len(told.GetPools()))
	for _, pool := range told.GetPools() {
		shares[pool.GetPool()] = int(pool.GetConnections())
	}
	f.config.Shares(shares)
}
