package controlplane

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newEtcdLogger passes the embedded store's warnings and errors on to logger.
func newEtcdLogger(logger *slog.Logger) *zap.Logger {
	return zap.New(&slogCore{LevelEnabler: zapcore.WarnLevel, logger: logger.With("part", "etcd")})
}

// slogCore is a zapcore.Core that writes to slog.
type slogCore struct {
	zapcore.LevelEnabler
	logger *slog.Logger
}

// With implements zapcore.Core.
func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{c.LevelEnabler, c.logger.With(slogArgs(fields)...)}
}

// Check implements zapcore.Core.
func (c *slogCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
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
