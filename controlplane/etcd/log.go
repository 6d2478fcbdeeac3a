package etcd

import (
	"context"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// chatter are warnings about what we chose: a single unix socket, no users, and
// what is said better elsewhere.
var chatter = map[string]bool{
	"Running http and grpc server on single port. This is not recommended for production.": true,
	"simple token is not cryptographically signed":                                         true,
	"alarm raised": true,
}

// newLogger passes the embedded store's warnings and errors on to the logger,
// until closing: that its listeners are closed then is not an error. What it calls
// fatal is kept for the one sentence that the operator reads.
func (s *Store) newLogger() *zap.Logger {
	core := &slogCore{LevelEnabler: zapcore.WarnLevel, logger: s.log.With("part", "etcd"), closing: &s.closing}
	return zap.New(core, zap.WithFatalHook(s.fatal), zap.WithPanicHook(s.fatal))
}

// slogCore is a zapcore.Core that writes to slog.
type slogCore struct {
	zapcore.LevelEnabler
	logger  *slog.Logger
	closing *atomic.Bool
}

// With implements zapcore.Core.
func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{c.LevelEnabler, c.logger.With(slogArgs(fields)...), c.closing}
}

// Check implements zapcore.Core.
func (c *slogCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) && !chatter[entry.Message] && !c.closing.Load() && entry.Level < zapcore.DPanicLevel {
		return checked.AddCore(entry, c)
	}
	return checked
}

// Write implements zapcore.Core.
func (c *slogCore) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if entry.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	c.logger.Log(context.Background(), level, entry.Message, slogArgs(fields)...)
	return nil
}

// Sync implements zapcore.Core.
func (c *slogCore) Sync() error { return nil }

func slogArgs(fields []zapcore.Field) []any {
	encoder := zapcore.NewMapObjectEncoder()
	for _, field := range fields {
		field.AddTo(encoder)
	}
	args := make([]any, 0, 2*len(fields))
	for key, value := range encoder.Fields {
		args = append(args, key, value)
	}
	return args
}
